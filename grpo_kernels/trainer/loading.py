"""A causal LM and its tokenizer by path or name; what cannot be trained is refused before its weights are read."""

import os
import re

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_ON_THE_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only")  # keyword arguments that say which files


def load(path, args, tokenizer=None):
    """(model, tokenizer). Raises ValueError naming the path, what was wanted and what is there."""
    path, code = os.fspath(path), args.trust_remote_code  # None would ask on the terminal
    refuse_missing(path, "model")
    options = {"dtype": "float32", "trust_remote_code": code, **(args.model_init_kwargs or {})}
    options["dtype"] = options.pop("torch_dtype", options["dtype"])  # its older name, which would lose in silence
    where = {name: options[name] for name in _WHERE if name in options}
    refuse_encoder(AutoConfig.from_pretrained(path, trust_remote_code=code, **where))
    tokenizer = tokenizer or load_tokenizer(path, code)
    return AutoModelForCausalLM.from_pretrained(path, **options), tokenizer


def load_tokenizer(path, trust_remote_code):
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {path!r} must come with its tokenizer, which cannot be loaded: {error}") from error


def refuse_encoder(config):
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder that continues its prompt, got an encoder-decoder ({config.model_type})")


def refuse_missing(path, name):
    """Before the network is asked: what is neither a folder nor may be a name of the hub."""
    if os.path.isdir(path):
        return
    if not _ON_THE_HUB.fullmatch(path) or os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"{name} {path!r}: no such folder, and no name of a model on the hub, which is owner/name")
