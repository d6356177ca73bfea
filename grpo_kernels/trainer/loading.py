"""A causal LM and its tokenizer by path or name; what cannot be trained is refused before its weights are read."""

import contextlib
import os
import re

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

_ON_THE_HUB = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # owner/name, or the name alone of an old one
# keyword arguments that say which files, and whether their code may run
_WHERE = ("revision", "code_revision", "subfolder", "cache_dir", "token", "local_files_only", "gguf_file", "trust_remote_code")


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
    return AutoModelForCausalLM.from_pretrained(path, **options), tokenizer


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
