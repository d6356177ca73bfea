"""The error of a part whose requirements are not installed: it names the extra that brings them."""

import contextlib

# the modules that each extra of pyproject.toml brings and this package imports
BRINGS = {
    "train": ("transformers", "accelerate", "datasets", "peft", "yaml", "tokenizers", "pyarrow"),
    "bench": ("matplotlib",),
}


class MissingExtra(ModuleNotFoundError):
    """A module that an optional part of the package imports is not installed."""


@contextlib.contextmanager
def needs(extra, user):
    """Around the imports of ``user``: a missing module that the extra brings becomes an error with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtra) or (error.name or "").split(".")[0] not in BRINGS[extra]:
            raise
        remedy = f"pip install 'grpo-kernels[{extra}]'"
        raise MissingExtra(f"{user} needs {error.name}, which is not installed: {remedy}", name=error.name) from error
