"""The per-token side of a call: inputs as [B, T], weights, which tokens may get a gradient, and the objective."""

from .arguments import PackedLayout
from .losses.coefficients import known_zero, on_policy_coefficients
from .losses.objective import objective, prepare, token_count, token_weights


class LossBatch:
    """Made once per call from its checked arguments; only `objective` and `row_vectors` have collectives."""

    def __init__(self, args, mask, config, dtype, data_parallel_group, wait=True):
        self.config, self.args = config, args
        self.layout = PackedLayout.of(args.cu_seqlens, mask, wait)
        self.group = data_parallel_group
        pad = self.layout.pad
        self.inputs = (self.layout.pad_advantages(args.advantages), pad(mask))
        self.tensors = {
            "old_logps": pad(args.old_logps),
            "ref_logps": pad(args.ref_logps),
            "importance_sampling_ratio": self.layout.pad_ratio(args.importance_sampling_ratio),
            "sampling_logps": pad(args.sampling_logps),
        }
        self.prepared = prepare(*self.inputs, dtype, **self.tensors, config=config)

    def live(self):
        """Tokens that may get a gradient, in the layout of the caller."""
        weights = token_weights(self.prepared.mask, self.config, self.args.num_items)
        return self.layout.unpad((self.prepared.mask > 0) & ~known_zero(self.prepared, weights, self.config))

    def objective(self, logps, entropy):
        return objective(
            self.layout.pad(logps), self.layout.pad(entropy), *self.inputs, **self.tensors, num_items=self.args.num_items,
            data_parallel_group=self.group, config=self.config,
        )  # fmt: skip

    def row_vectors(self, selection):
        """(w_policy, advantages, old, ref, w_kl, w_entropy) of the live rows, None where the loss has no such part."""
        t, config = self.prepared, self.config
        u = token_weights(t.mask, config, self.args.num_items, self.group)
        vectors = dict.fromkeys(("w_policy", "advantages", "old", "ref", "w_kl", "w_entropy"))
        if t.old is None:
            vectors["w_policy"] = on_policy_coefficients(t, u, config)
        else:
            vectors["w_policy"] = u if t.rho is None else u * t.rho
            vectors["advantages"], vectors["old"] = t.advantages.expand_as(t.mask), t.old
        if t.ref is not None:
            vectors["ref"], vectors["w_kl"] = t.ref, config.beta * u
        if config.entropy_coef != 0:
            vectors["w_entropy"] = -config.entropy_coef * t.mask / token_count(t.mask, self.group)
        return [None if x is None else selection.take(self.layout.unpad(x), live_only=True) for x in vectors.values()]
