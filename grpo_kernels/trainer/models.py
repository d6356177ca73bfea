"""Policy, reference and tokenizer made ready; what cannot be trained is refused, by path before its weights are read."""

import contextlib
import copy
import dataclasses
import os
import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import unwrap_peft_model

from ..integrations.transformers import fuse_lm_head
from . import microbatch

_ON_THE_HUB = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # owner/name, or the name alone of an old one
# keyword arguments that say which files, and whether their code may run
_WHERE = ("revision", "code_revision", "subfolder", "cache_dir", "token", "local_files_only", "gguf_file", "trust_remote_code")


def policy_and_reference(model, args, tokenizer, peft_config):
    """(policy, reference, tokenizer): the policy trains, with its output layer fused; no reference where ``args`` needs no copy."""
    if isinstance(model, (str, os.PathLike)):
        model, tokenizer = load(model, args, tokenizer)
    refuse_encoder(getattr(model, "config", None))
    if tokenizer is None:
        raise ValueError("processing_class must be a tokenizer when the model is not given by its path, got None")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs 4-bit weights on a CPU when it samples; packed ones pass no gradient on, and say nothing
            module.support_avx512bf16_for_cpu = False
    if peft_config is not None:
        import peft

        model = peft.get_peft_model(model, peft_config)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    causal_lm, reference = unwrap_peft_model(model), None
    if args.beta != 0 and causal_lm is model:
        reference = fuse_lm_head(copy.deepcopy(model).eval().requires_grad_(False))
    elif args.sync_ref_model:
        raise ValueError("sync_ref_model must be False under PEFT: its reference is the model without adapters, got True")
    if reference is not None and args.kl_estimator == "exact" and is_deepspeed_zero3_enabled():
        raise ValueError(
            "kl_estimator must be 'k3' under ZeRO-3, unless an adapter is trained: while the policy runs, the reference's head "
            "is in parts, got 'exact'"
        )
    fuse_lm_head(causal_lm)
    model.train()  # as it will be, so that `lm_head` refuses now what it would refuse then
    if args.gradient_checkpointing and causal_lm is not model:
        model.enable_input_require_grads()  # frozen embeddings would cut the checkpointed layers off the graph
    return model, reference, tokenizer


def load(path, args, tokenizer=None):
    """(model, tokenizer). Raises ValueError naming the path, what was wanted and what is there."""
    path = os.fspath(path)
    # None as trust_remote_code would ask on the terminal
    options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    options["dtype"] = options.pop("torch_dtype", options["dtype"])  # its older name, which would lose in silence
    where = {name: options[name] for name in _WHERE if name in options}
    with finding(path, "model"):
        config = options.get("config")
        refuse_encoder(config if isinstance(config, PreTrainedConfig) else AutoConfig.from_pretrained(config or path, **where))
    tokenizer = tokenizer or load_tokenizer(path, **where)
    with whole_under_zero3(args):
        return AutoModelForCausalLM.from_pretrained(path, **options), tokenizer


@contextlib.contextmanager
def whole_under_zero3(args):
    """transformers shards what it loads under ZeRO-3 whatever accelerate's zero3_init_flag says; here False is False."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None or plugin.zero3_init_flag or not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def load_tokenizer(path, **where):
    try:
        return AutoTokenizer.from_pretrained(path, **where)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {path!r} must come with its tokenizer, which cannot be loaded: {error}") from error


def refuse_encoder(config):
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder that continues its prompt, got an encoder-decoder ({config.model_type})")


@contextlib.contextmanager
def finding(path, name):
    """Around what reads a model's first file. What cannot be a name of the hub is refused before the network is asked."""
    if not os.path.isdir(path) and not _ON_THE_HUB.fullmatch(path):
        raise ValueError(f"{name} {path!r}: no such folder, and no name of a model on the hub, which is owner/name")
    try:
        yield
    except OSError as error:
        folder, missing = os.path.split(path)
        if os.path.isdir(path) or not os.path.isdir(folder):
            raise
        raise ValueError(f"{name} {path!r}: folder {folder!r} is here and has no {missing!r}; asked the hub: {error}") from error


def with_head_factors(config, head):
    """The loss's options with the model's own logit factors, which are what it samples with."""
    for name in ("logit_scale", "softcap"):
        default = getattr(type(config), name)
        asked, own = getattr(config, name), getattr(head, name)
        if asked != default and asked != own:
            raise ValueError(f"{name} must be the model's own ({own}) or left alone, got {asked}")
    return dataclasses.replace(config, logit_scale=head.logit_scale, softcap=head.softcap)


def runs_packed(asked, causal_lm, takes_position_ids) -> bool:
    """Whether the model runs on rows without padding: as ``asked``, where it can."""
    # convolutions, recurrences and chunked attention go by places in the row, across the sequences that are packed in it
    layers = set(getattr(causal_lm.config.get_text_config(), "layer_types", None) or ())
    by_positions = layers <= {"full_attention", "sliding_attention"} and not getattr(causal_lm, "_is_stateful", False)
    able = takes_position_ids and by_positions
    if asked and not able:
        name = type(causal_lm).__name__
        raise ValueError(f"padding_free must be False or None for {name}, which cannot tell packed rows apart, got True")
    return able and microbatch.flash(causal_lm) if asked is None else asked


def router_coefficient(causal_lm):
    """Of the load-balancing loss of a mixture of experts, where the model's configuration asks for it; else None."""
    text = causal_lm.config.get_text_config()
    return getattr(text, "router_aux_loss_coef", 0.0) if getattr(text, "output_router_logits", False) else None
