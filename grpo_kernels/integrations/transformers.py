"""A fused head inside a causal LM's own forward.

A head that is read from outside (`model.lm_head.weight`) is invisible to DDP and sharded away by FSDP and ZeRO-3. So the model
itself learns one keyword, and makes log-probs where its logits would have been made:

    model(input_ids=ids, labels=labels, fused_lm_head=True)   log-probs and entropy of the labels, `FusedCausalLMOutput`
    model(input_ids=ids, fused_lm_head=fn)                    whatever fn(hidden, head) returns: a whole loss, for instance

Both run inside the call of the output layer, so that the hooks which gather a sharded layer, and reduce its gradient, fire as
they do for logits. Every other call, `generate` included, is unchanged.

A copy and a pickle (`torch.save(model)`) of a fused model are fused. What accelerate's `unwrap_model(keep_fp32_wrapper=False)`
returns is fused, but must go through `fuse_lm_head` again before it is pickled. `save_pretrained` keeps weights alone: fuse what
`from_pretrained` returns. A model that was never fused cannot refuse the keyword, since transformers' forwards ignore keywords that
they do not know: it returns logits and no log_probs. `is_fused` tells.
"""

import copy
import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ..checks import check_options, kind
from ..engine.diagnostics import NAMES as DIAGNOSTICS
from ..extras import needs
from ..logprobs import token_statistics
from ..losses.config import GRPOLossConfig
from ..support import TokenSupport, check_support, found_in, wrong_token, wrong_values

with needs("train", __name__):
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

OUTPUTS = ("log_probs", "entropy", *DIAGNOSTICS)


class LMHead(NamedTuple):
    """What turns last hidden states into logits: `softcap * tanh(logit_scale * (h W^T + bias) / softcap)`."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # A [r, D], B [V, r], scale
    logit_scale: float
    softcap: float | None


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What a fused model returns for labels [B, T]: each per-token field is [B, T - 1] ([B, T] for ``shift_labels``), 0 where the
    label is -100, and None where it was not asked for. The names are TRL's.

    Attributes:
        loss: 0-dim; minus the sum of ``log_probs`` over ``num_items_in_batch`` (None: the labels that count), plus the model's
            router loss by its coefficient where router logits are requested.
        log_probs: float32, differentiable.
        entropy: float32, differentiable.
        log_sum_sq_probs, mean_logits: float32, log sum_v p_v^2 and the mean of the logits, without gradient.
        is_top1: bool, whether the label is the most likely token.
        score_sq_norm: float32, 1 - 2 p + sum_v p_v^2 of the label's p, without gradient: the weight of an optimal token baseline.
        label_mask: bool, where the label is not -100.
        aux_loss: 0-dim, the load-balancing loss of a mixture of experts, where router logits are requested.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    score_sq_norm: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def fuse_lm_head(model, verify=True, *, temperature=1.0, outputs=("log_probs", "entropy"), head_in_float32=False,
                 workspace_bytes=None, backend="auto"):  # fmt: skip
    """Teach this instance of a causal LM the keyword ``fused_lm_head``.

    ``model(..., labels=labels, fused_lm_head=True).log_probs`` equals
    ``(model(...).logits / temperature).log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:])`` where the label is not -100.
    ``model(..., fused_lm_head=fn)`` equals ``fn(model.base_model(...).last_hidden_state, lm_head(model))``. Under FSDP2 and ZeRO-3
    fn must return a tensor, or a tuple or dict of them: their hooks look no further for what the backward will come through.
    A tensor-parallel output layer (a DTensor) is gathered whole for the call: for a vocabulary-parallel head give its weight to
    `linear_logprobs` or `fused_linear_grpo_loss` yourself.

    The forward then takes, beside its own arguments: ``labels`` [B, T] int64 with -100 where nothing is scored, or
    ``shift_labels`` [B, T], which are not shifted; ``temperature``, a number or a tensor shaped like the labels given, instead of
    the one given here; ``support``, a `TokenSupport` of the flattened [B, T] of the labels given, the tokens that each label could
    have been sampled as, over which log-probs and entropy are then taken; ``num_items_in_batch``, the divisor of the loss. Rows
    without a label cost nothing.

    Args:
        model: a `transformers` causal LM, or one under PEFT or DDP; before FSDP, DeepSpeed and accelerate wrap it.
        verify: run four tokens both ways and compare the logits, so that an architecture which treats its logits in a way
            unknown here is refused and not trained wrongly.
        temperature: what the logits are divided by.
        outputs: which per-token fields are wanted, of ``OUTPUTS``; log_probs always come.
        head_in_float32: run the head in float32 and outside of autocast.
        workspace_bytes, backend: as in `linear_logprobs`.

    Returns:
        The same model. Its forward returns `FusedCausalLMOutput` with ``fused_lm_head=True``. Fused again it has new options.

    Raises:
        NotImplementedError: the logits of this architecture are not what its head and configuration say; it is left as it was.
        TypeError: not a causal LM, an encoder-decoder model, or one that is wrapped otherwise.
        ValueError: an option is not legal, or another forward was put over that of a fused model.
    """
    given, model = model, causal_lm(model)
    _check_options(temperature, outputs, workspace_bytes, backend)
    options = {"temperature": temperature, "diagnostics": outputs, "workspace_bytes": workspace_bytes, "backend": backend}
    before = {name: vars(model)[name] for name in ("forward", "_fused_lm_head") if name in vars(model)}
    forward, fused = before.get("forward"), is_fused(model)
    earlier = before.get("_fused_lm_head") if forward is not None else None
    over = getattr(getattr(forward, "__func__", forward), "__globals__", {}).get("__name__")
    if earlier is not None and not fused and over != "trl.trainer.utils":
        raise ValueError(f"model.forward was replaced after fuse_lm_head, in {over}: take a model from from_pretrained")
    # TRL's forward over ours calls ours, so ours must not call it
    unfused = earlier.unfused if earlier is not None else forward
    model._fused_lm_head = _Fused(model, options, head_in_float32, unfused)
    if not fused or isinstance(getattr(forward, "__func__", None), _FusedForward):
        model.forward = _Bound(_FusedForward(type(model)), model)
    try:
        if verify:
            _verify(model)
    except BaseException:
        for name in ("forward", "_fused_lm_head"):
            vars(model).pop(name, None)
        vars(model).update(before)
        raise
    return given


@dataclass
class _Fused:
    """What a fused model carries, so that it is copied and pickled with it."""

    model: PreTrainedModel
    options: dict
    head_in_float32: bool
    unfused: Callable | None  # the forward that this instance had, None where it was its class's

    def __deepcopy__(self, memo):
        return _Fused(*copy.deepcopy(tuple(vars(self).values()), memo))

    def __reduce__(self):
        # a method is pickled by its name, and by that a model that is being loaded finds its class's forward
        if is_fused(self.model) and not isinstance(self.model.forward, functools.partial):
            raise pickle.PicklingError(
                "a fused model must not be pickled as accelerate prepared or unwrapped it: call "
                "unwrap_model(model, keep_fp32_wrapper=False), then fuse_lm_head again"
            )
        return _Fused, tuple(vars(self).values())


class _Bound(functools.partial):
    """A method to accelerate, which wraps its function and binds the wrapper to the model: a copy of that runs the copy."""

    @property
    def __func__(self):
        return self.func


class _FusedForward:
    """The forward of the fused models of a class, as a function of the model. An object and no closure: it is pickled."""

    def __init__(self, cls):
        self.cls = cls

    @property
    def __signature__(self):  # generate reads it
        return inspect.signature(self.cls.forward)

    def __call__(self, model, /, *args, fused_lm_head=None, labels=None, shift_labels=None, num_items_in_batch=None,
                 temperature=None, support=None, **kwargs):  # fmt: skip
        fused = model._fused_lm_head
        if support is not None and (not fused_lm_head or callable(fused_lm_head)):
            # a forward of transformers ignores a keyword that it does not know
            raise ValueError(f"support must come with fused_lm_head=True, got it with fused_lm_head={fused_lm_head!r}")
        if not fused_lm_head:
            labelled = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch,
                        "temperature": temperature}  # fmt: skip
            kwargs |= {name: value for name, value in labelled.items() if value is not None}
            return self.cls.forward(model, *args, **kwargs) if fused.unfused is None else fused.unfused(*args, **kwargs)
        body = {"use_cache": False} | {name: value for name, value in kwargs.items() if value is not None}
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            body.setdefault("output_router_logits", True)
        states = model.base_model(*args, **body)
        attention_mask = args[1] if len(args) > 1 else body.get("attention_mask")
        aux_loss = _router_loss(model, states, attention_mask) if body.get("output_router_logits") else None
        if callable(fused_lm_head):
            result = _inside_head(model, states[0], fused_lm_head, fused.head_in_float32)
            return (result, aux_loss) if kwargs.get("output_router_logits") else result

        target = _targets(labels, shift_labels, states[0])
        given = fused.options if temperature is None else fused.options | {"temperature": temperature}
        if shift_labels is None and isinstance(given["temperature"], torch.Tensor) and given["temperature"].dim():
            given = given | {"temperature": given["temperature"][:, 1:]}
        over = None if support is None else _support(support, given["diagnostics"], labels, shift_labels)

        def score(hidden, head):
            hidden = hidden if shift_labels is not None else hidden[:, :-1]
            try:
                return _scored(hidden, target.to(hidden.device), head, given, None if over is None else over.to(hidden.device))
            except ValueError:
                if support is not None:
                    _check_values(support, labels, shift_labels, len(head.weight))
                raise

        output = _inside_head(model, states[0], score, fused.head_in_float32)
        count = output.label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        output.loss = -output.log_probs.sum() / count
        if aux_loss is not None:
            output.aux_loss = aux_loss
            output.loss = output.loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return output


def is_fused(model) -> bool:
    """Whether this causal LM's forward is the one that `fuse_lm_head` gave it, or a wrapper of it: accelerate's autocast."""
    forward = causal_lm(model).forward
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if isinstance(forward, _FusedForward):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def causal_lm(model):
    """The causal LM inside DDP's and PEFT's wrappers, which hand keywords through."""
    found = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    found = found.get_base_model() if hasattr(found, "get_base_model") else found
    if not isinstance(found, PreTrainedModel) or found.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers causal LM (PEFT's or DDP's around it at most), got {type(found).__name__}")
    if getattr(found.config, "is_encoder_decoder", False):
        raise TypeError(
            f"model must be a decoder, got {type(found).__name__}, an encoder-decoder model; give its decoder's hidden states "
            "and its output layer's weight to linear_logprobs"
        )
    return found


def _check_options(temperature, outputs, workspace_bytes, backend):
    names = [outputs] if isinstance(outputs, str) else list(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or isinstance(outputs, str):
        raise ValueError(f"outputs must be a tuple of {', '.join(OUTPUTS)}, got {outputs!r}")
    config = GRPOLossConfig() if isinstance(temperature, torch.Tensor) else GRPOLossConfig(temperature=temperature)
    check_options(config, workspace_bytes, backend)


def _targets(labels, shift_labels, states):
    """What each position is to predict: [B, T - 1], or [B, T] where the labels come shifted."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if (labels is None) == (shift_labels is None):
        found = "neither" if given is None else "both"
        raise ValueError(f"labels or shift_labels must be given with fused_lm_head=True, got {found}")
    if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be int64, got {kind(given)}")
    if given.shape != states.shape[:2]:
        raise ValueError(f"{name} must be [B, T] = {list(states.shape[:2])} as the hidden states are, got {list(given.shape)}")
    return given.long()[:, 1:] if shift_labels is None else given.long()


def _support(support, outputs, labels, shift_labels):
    """Of what each position is to predict: the first column of labels goes, as it does from them."""
    if any(name in DIAGNOSTICS for name in outputs):
        raise ValueError(f"outputs of fuse_lm_head must be log_probs and entropy alone with a support, got {tuple(outputs)}")
    given = labels if shift_labels is None else shift_labels
    device = support.ids.device if isinstance(support, TokenSupport) else given.device
    check_support(support, given.shape, device)  # on any device, as labels are
    if shift_labels is not None:
        return support
    if wrong := support.facts().wrong:
        raise ValueError(wrong)
    return support.take(torch.arange(given.numel(), device=device).view(given.shape)[:, 1:].flatten())


def _check_values(support, labels, shift_labels, vocab):
    """Raises what a call over what each position is to predict would, by the caller's own name and place."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    given, kept = given.to(support.ids.device).long(), (given != -100).to(support.ids.device)
    if shift_labels is None:
        kept[:, 0] = False  # nothing predicts it
    facts = support.facts()
    wrong = wrong_values(support, facts, kept.flatten(), vocab, given.shape)
    if not wrong and (kept.flatten() & (found_in(support, facts, given.flatten()) < 0)).any():
        wrong = wrong_token(support, kept.flatten(), given.flatten(), given.shape, name)
        if shift_labels is None:
            wrong = wrong.replace("hidden[t]", "hidden[t - 1]")
    if wrong:
        raise ValueError(wrong)


def lm_head(model, dtype=None, adapters=True) -> LMHead:
    """The output layer of a causal LM as numbers: adapters on it apart, factors from the model's configuration.

    ``dtype`` is what weight, bias and adapter are cast to; None is the weight's. ``adapters=False``: the layer that PEFT adapts, as
    it is where the adapters are switched off; the same tensors.

    Raises:
        NotImplementedError: it carries an adapter that is more than ``h W^T + scale (h A^T) B^T``, or quantized weights.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT: a trained copy beside the original
        active = layer.active_adapters if adapters and not layer.disable_adapters else ()
        saved = [name for name in active if name in layer.modules_to_save]
        layer = layer.modules_to_save[saved[0]] if saved else layer.original_module
    elif not adapters and hasattr(layer, "token_adapter"):  # PEFT: trained rows beside the original
        layer = layer.original_module
    elif "base_layer" in layer._modules and (layer.disable_adapters or not adapters) and layer.merged:
        layer.unmerge()  # as PEFT's own forward does
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not weight.is_floating_point():
        raise NotImplementedError(f"the output layer must hold plain weights, got {type(weight).__name__} of {weight.dtype}")
    dtype = weight.dtype if dtype is None else dtype
    lora = _adapter(layer, dtype) if adapters else None
    scale, softcap = _factors(model.config.get_text_config())
    return LMHead(_local(weight).to(dtype), None if bias is None else _local(bias).to(dtype), lora, scale, softcap)


def _adapter(layer, dtype):
    """(A, B, scale) of the active LoRA adapters of a layer, several as one; None where there is none."""
    # PEFT's layers keep what they adapt as base_layer; a tied head with trained token rows has them in its weight already
    if "base_layer" not in layer._modules or layer.disable_adapters or layer.merged:
        return None
    if not hasattr(layer, "lora_A"):
        raise NotImplementedError(f"an adapter on the output layer must be a plain LoRA, got {type(layer).__name__}")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    for name in names:
        if isinstance(layer.lora_dropout[name], torch.nn.Dropout) and layer.lora_dropout[name].p > 0 and layer.training:
            raise NotImplementedError("lora_dropout must be 0 on the output layer: set LoraConfig(lora_dropout=0.0)")
        plain = isinstance(layer.lora_A, torch.nn.ModuleDict)  # not AdaLoRA's parameters
        if not plain or name in getattr(layer, "lora_variant", {}) or layer.lora_B[name].bias is not None:
            raise NotImplementedError("an adapter on the output layer must be a plain LoRA without lora_bias, DoRA and the like")
    factors = [(_local(layer.lora_A[name].weight).to(dtype), _local(layer.lora_B[name].weight).to(dtype)) for name in names]
    if len(names) == 1:
        return *factors[0], float(layer.scaling[names[0]])
    scaled = [layer.scaling[name] * b for name, (_, b) in zip(names, factors, strict=True)]
    return torch.cat([a for a, _ in factors]), torch.cat(scaled, dim=1), 1.0


def _factors(config):
    """(logit_scale, softcap) by the names that architectures give them."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = scale if getattr(config, name, None) is None else scale * getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _local(tensor):
    """A tensor-parallel weight gathered: once a call, its gradient cut back to the shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.compiler.disable  # Dynamo loses a module's forward that is replaced under way; the backbone is compiled nevertheless
def _inside_head(model, hidden, fn, in_float32):
    """fn(hidden, head) as the output layer's own forward."""
    layer = model.get_output_embeddings()
    if layer.weight.is_meta:
        raise RuntimeError("the output layer's weight is not in memory (a device map sends it to CPU or disk); keep it on a device")

    def run(hidden):
        head = lm_head(model, torch.float32 if in_float32 else None)
        hidden = hidden.to(head.weight.device)
        if not in_float32:
            return fn(hidden, head)
        with torch.autocast(hidden.device.type, enabled=False):
            return fn(hidden.float(), head)

    own = layer.__dict__.get("forward")
    layer.forward = run
    try:
        return layer(hidden)
    finally:
        _restore_forward(layer, own)


def _restore_forward(module, own):
    """``own``: the forward of this instance, or None where it is its class's."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def _scored(hidden, labels, head, options, support):
    mask = labels != -100
    logps, entropy, *diagnostics = token_statistics(
        hidden, head.weight, labels.where(mask, 0), mask=mask, bias=head.bias, lora=head.lora, logit_scale=head.logit_scale,
        softcap=head.softcap, support=support, **options,
    )  # fmt: skip
    return FusedCausalLMOutput(None, logps, entropy if "entropy" in options["diagnostics"] else None, *diagnostics, mask)


def _router_loss(model, states, attention_mask):
    """The load-balancing loss as the model's own forward computes it, without its coefficient."""
    # FSDP2 makes a class of its own in front of the model's
    modules = [vars(sys.modules[cls.__module__]) for cls in type(model).__mro__]
    function = next((names["load_balancing_loss_func"] for names in modules if "load_balancing_loss_func" in names), None)
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None or states.get("router_logits") is None:
        raise NotImplementedError(f"{type(model).__name__} has no load-balancing loss of router logits; call it without them")
    return function(states.router_logits, experts, chosen, attention_mask)


def _verify(model):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=model.device).unsqueeze(0) % model.get_output_embeddings().weight.shape[0]
            theirs = model(input_ids=ids, use_cache=False).logits.float()
            ours = model(input_ids=ids, use_cache=False, fused_lm_head=_full_logits).float()
    finally:
        for module, mode in modes:
            module.training = mode
    # bf16 logits differ by some 1e-2 of their norm at most; a forgotten factor by its distance from 1
    if ours.shape != theirs.shape or (ours - theirs).norm() > 0.02 * theirs.norm():
        raise NotImplementedError(
            f"{type(model).__name__} does not make its logits from last hidden states, output layer, logit_scale, "
            "logits_scaling and final_logit_softcapping alone; its fused loss would be that of another model"
        )


def _full_logits(hidden, head):
    z = hidden @ head.weight.T
    if head.lora is not None:
        a, b, scale = head.lora
        z = z + scale * (hidden @ a.T @ b.T)
    z = head.logit_scale * (z if head.bias is None else z + head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
