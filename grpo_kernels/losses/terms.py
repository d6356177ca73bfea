"""The policy terms: one function a loss, the registry of them, and what the fused row kernels are told of one.

A term is ``s(w, logps, old_logps, advantages, config)``, per token, to be minimised; w is the clamped importance ratio, one per
token or, at sequence level, one per sequence. Autograd of these functions is the specification of every coefficient in the kernels.
"""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# The terms that the fused row kernels know, by the number that they are handed: the one table of them for every language.
# linear: the coefficient d loss / d logps is w_policy itself.
KINDS = ("clipped", "cispo", "sapo", "linear")
EXP_BOUND = 80.0
_FLOAT32_EXP_BOUND = 88.0
_TINY = 1e-8  # verl's, in the KL of two Bernoulli distributions


@dataclass(frozen=True)
class PolicyTerm:
    """A loss by name: its policy term, and how the tokens' losses are added up."""

    function: Callable
    aggregation: str  # the loss_type of TRL's whose normaliser it uses
    kind: str | None = None  # one of KINDS; None: the row kernels do not know it, autograd of the term makes the coefficient
    registered: bool = False
    scope: str = "token"  # whose log-probs an off-policy token's coefficient needs: "token", "sequence" or "call"
    has_levels: bool = False  # whether it reads importance_sampling_level
    trains_at_zero: bool = False  # whether a token whose advantage is 0 may have a gradient

    def of(self, w, logps, old_logps, A, config):
        """s; NaN where w is, also of a function that drops or clamps w: a log-prob that is not finite shows."""
        return self.function(w, logps, old_logps, A, config) + 0 * w


def clamped_exp(*arguments):
    """exp of the sum of the arguments, each clamped to +-80, so that finite log-probs give finite ratios; the gradient passes.

    A product of two such exps, w exp(r), would overflow float32: the sum stops at 88 there.
    """
    value = sum(x.detach().clamp(-EXP_BOUND, EXP_BOUND) for x in arguments)
    if value.dtype == torch.float32:
        value = value.clamp(max=_FLOAT32_EXP_BOUND)
    # adds exactly 0, or NaN where an argument is not finite
    return torch.exp(value + sum(x - x.detach() for x in arguments))


def sum_per_sequence(x):
    return x.sum(1, keepdim=True)


def mean_per_sequence(x, m):
    """[B, 1] means over kept tokens of [B, 1] or [B, T], 0 where nothing is kept."""
    return sum_per_sequence((x * m).where(m > 0, 0.0)) / sum_per_sequence(m).clamp(min=1)


def _clipped(w, logps, old_logps, A, config):
    bounded = w if config.ratio_bound is None else w.clamp(max=config.ratio_bound)
    return -torch.min(bounded * A, w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * A)


def _dual_clipped(w, logps, old_logps, A, config):
    loss = -torch.min(w * A, w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * A)
    return torch.where(A < 0, torch.min(loss, -config.ratio_bound * A), loss)


def _cispo(w, logps, old_logps, A, config):
    return -w.clamp(max=config.upper_epsilon).detach() * A * logps


def _sapo(w, logps, old_logps, A, config):
    tau = choose(A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, A)
    return -4 / tau * torch.sigmoid(tau * (w - 1)) * A


def _dppo(w, logps, old_logps, A, config):
    inside = ~beyond_trust_region(logps, old_logps, A, config)
    return -A * w.clamp(max=config.ratio_bound).detach() * inside * logps


@torch.no_grad()
def beyond_trust_region(logps, old_logps, A, config):
    """Where DPPO masks a token: its probability has moved too far, in the direction that its advantage asks for.

    The distance is that of two Bernoulli distributions, the token and all others: total variation or KL. A NaN is beyond.
    """
    p, q = logps.exp(), old_logps.exp()
    limit = choose(A > 0, config.upper_epsilon, config.epsilon, A)
    if config.loss_type == "dppo_tv":
        return ~(torch.where(A > 0, p - q, q - p) <= limit)
    rest = _TINY - torch.expm1(old_logps), _TINY - torch.expm1(logps)
    kl = q * (old_logps - logps) - torch.expm1(old_logps) * (rest[0] / rest[1]).log()
    return ~((kl <= limit) | torch.where(A > 0, p <= q, p >= q))


def _dro(w, logps, old_logps, A, config):
    d = logps - old_logps
    return -A * logps + 0.5 * config.dro_beta * d.square()


def choose(positive, first, second, like):
    """where() of two Python numbers would round them to float32."""
    return torch.where(positive, like.new_full((), first), like.new_full((), second))


TERMS = {name: PolicyTerm(_clipped, name, "clipped") for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")}
TERMS |= {"cispo": PolicyTerm(_cispo, "cispo", "cispo"), "sapo": PolicyTerm(_sapo, "sapo", "sapo")}
# vespo's phi belongs to a sequence: the objective multiplies it into the weight, and what is left is linear in logps
TERMS["vespo"] = PolicyTerm(lambda w, logps, old_logps, A, config: -A * logps, "vespo", scope="sequence")
TERMS = {name: replace(term, has_levels=True) for name, term in TERMS.items()}
AGGREGATIONS = tuple(TERMS)  # also the names of TRL's losses
# verl's. The objective makes w a sequence's for gspo and geo_mean, and marks tokens by what all of a call are like for the last two
TERMS |= {
    "vanilla": PolicyTerm(_dual_clipped, "dapo", "clipped"),
    "gspo": PolicyTerm(_clipped, "grpo", "clipped", scope="sequence"),
    "geo_mean": PolicyTerm(lambda w, logps, old_logps, A, config: -A * w, "grpo", scope="sequence"),
    "dppo_tv": PolicyTerm(_dppo, "dapo"),
    "dppo_kl": PolicyTerm(_dppo, "dapo"),
    "gpg": PolicyTerm(lambda w, logps, old_logps, A, config: -A * logps, "dapo"),
    "dro": PolicyTerm(_dro, "dapo", trains_at_zero=True),
    "clip_cov": PolicyTerm(_clipped, "dapo", scope="call"),
    "kl_cov": PolicyTerm(lambda w, logps, old_logps, A, config: -A * w, "dapo", scope="call", trains_at_zero=True),
}
BUILT_IN = tuple(TERMS)


def register_policy_term(name: str, term: Callable, *, aggregation: str = "dapo", overwrite: bool = False) -> None:
    """Makes ``loss_type=name`` a loss everywhere: functions, module, trainer, reference and command line.

    Equals the built-in losses with s = ``term``: ``loss = sum_t u_t s(logps_t, old_logps_t, A_t)`` and their KL, u the weights of
    ``aggregation``. At token level it costs one pass, as they do; autograd of ``term`` on a chunk's vectors is its coefficient.

    Args:
        name: the loss_type; not that of a built-in loss.
        term: ``term(logps, old_logps, advantages, config) -> [R]``, the per-token loss, of three [R] tensors in the compute dtype;
            elementwise, without state, differentiable in logps by autograd. old_logps is ``logps.detach()`` on-policy. At sequence
            level logps is ``old_logps`` plus the sequence's mean log-ratio. Gradients of anything
            else in it are lost. The importance ratio is the term's to compute, and to bound: ``(logps - old_logps).exp()``.
        aggregation: the loss_type whose normaliser it uses; one of ``AGGREGATIONS``.
        overwrite: replace an earlier term of that name and aggregation.

    Raises:
        TypeError: name is no string, or term cannot be called with these four. ValueError: the name is taken, or there is no such
            aggregation.
    """
    if not isinstance(name, str) or not callable(term):
        wanted = ("name", "a string", name) if not isinstance(name, str) else ("term", "a function", term)
        raise TypeError("{} must be {}, got {!r}".format(*wanted))
    with contextlib.suppress(ValueError):  # a builtin without a signature
        try:
            inspect.signature(term).bind("logps", "old_logps", "advantages", "config")
        except TypeError:
            raise TypeError(f"term must take (logps, old_logps, advantages, config), got {term!r}") from None
    if not name.isidentifier() or name in BUILT_IN:
        raise ValueError(f"name must be an identifier and none of the built-in losses {', '.join(BUILT_IN)}, got {name!r}")
    if name in TERMS and not overwrite:
        raise ValueError(f"name {name!r} is registered already; overwrite=True replaces it")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if name in TERMS and TERMS[name].aggregation != aggregation:  # configs of that name were validated with it
        raise ValueError(f"aggregation of {name!r} must stay {TERMS[name].aggregation!r}, got {aggregation!r}")

    def function(w, logps, old_logps, A, config):
        shape = torch.broadcast_shapes(logps.shape, old_logps.shape, A.shape)
        # copies of what shares memory with the rest of the call
        s = term(logps.expand(shape).reshape(-1), *(x.expand(shape).reshape(-1).clone() for x in (old_logps, A)), config)
        if not isinstance(s, torch.Tensor) or s.shape != (shape.numel(),) or s.dtype != logps.dtype:
            found = f"{list(s.shape)} {s.dtype}" if isinstance(s, torch.Tensor) else type(s).__name__
            wanted = f"one loss a token, [{shape.numel()}] {logps.dtype}"
            raise ValueError(f"the term of loss_type={name!r} must return {wanted}, got {found}")
        return s.reshape(shape)

    TERMS[name] = PolicyTerm(function, aggregation, registered=True, has_levels=True, trains_at_zero=True)


def k3(log_w, w, r, config):
    """The KL estimate from r = ref - logps, times the ratio w = exp(log_w) where it is bias-corrected."""
    return clamped_exp(r, log_w) - w * (r + 1) if config.use_bias_correction_kl else clamped_exp(r) - r - 1


@dataclass(frozen=True)
class PolicyTerms:
    """Scalars of the fused row kernel: which policy term, and its constants."""

    kind: str  # one of KINDS
    epsilon_low: float = 0.2  # the clip range is [1 - epsilon_low, 1 + epsilon_high]; cispo's cap is epsilon_high itself
    epsilon_high: float = 0.2
    delta: float = float("inf")  # upper bound of the ratio in the unclipped branch; inf: none
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    use_bias_correction_kl: bool = True


@dataclass(frozen=True)
class PolicyRows:
    """Per-row inputs of the fused row kernel, [R] each in the compute dtype; None where a loss has no such part."""

    w_policy: torch.Tensor | None  # weight of s; for kind "linear" d loss / d logps itself
    advantages: torch.Tensor | None = None
    old: torch.Tensor | None = None  # None: the ratio is 1, with gradient
    ref: torch.Tensor | None = None
    w_kl: torch.Tensor | None = None
    w_entropy: torch.Tensor | None = None  # d loss / d entropy

    def of(self, rows):
        """Some of the rows."""
        return PolicyRows(*(None if x is None else x[rows] for x in vars(self).values()))


def kernel_terms(config, linear) -> PolicyTerms | None:
    """What the fused row kernels are told of a loss, without a config of the log-prob itself; None for a term they do not know."""
    if config is None:
        return PolicyTerms("linear")
    kind = "linear" if linear else TERMS[config.loss_type].kind
    if config.loss_type == "vanilla" and config.ratio_bound < 1 + config.upper_epsilon:
        kind = None  # then the two bounds cross, and the kernels' two-sided clipping is another function
    return None if kind is None else PolicyTerms(
        kind=kind,
        epsilon_low=float(config.epsilon),
        epsilon_high=float(config.upper_epsilon),
        delta=float("inf") if config.ratio_bound is None else float(config.ratio_bound),
        sapo_temperature_pos=float(config.sapo_temperature_pos),
        sapo_temperature_neg=float(config.sapo_temperature_neg),
        use_bias_correction_kl=config.use_bias_correction_kl and not config.sequence_level,
    )  # fmt: skip


def row_coefficient(logps, rows: PolicyRows, config, linear):
    """d loss / d logps [R] of rows whose coefficient depends on themselves alone, by autograd of their term and of k3."""
    if config is None:
        return rows.w_policy
    with torch.enable_grad():
        own = logps.detach().requires_grad_()
        old = logps.detach() if rows.old is None else rows.old
        log_w = own - old
        w = clamped_exp(log_w)
        term = own if linear else TERMS[config.loss_type].of(w, own, old, rows.advantages, config)
        loss = rows.w_policy * term
        if rows.ref is not None:
            loss = loss + rows.w_kl * k3(log_w, w, rows.ref - own, config)
        return torch.autograd.grad(loss.sum(), own)[0]
