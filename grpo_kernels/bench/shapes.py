"""Heads of known models, and how a user names a shape."""

import difflib
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    sequences: int = 8  # B
    length: int = 128  # T
    depth: int = 896  # D
    vocab: int = 151_936  # V
    dtype: str = "bfloat16"

    @property
    def tokens(self):
        return self.sequences * self.length

    def of(self, tokens):
        """The same head, as many tokens."""
        return replace(self, length=max(1, tokens // self.sequences))

    def fields(self) -> dict:
        """As a row of the JSON holds it."""
        return {"tokens": self.tokens, "depth": self.depth, "vocab": self.vocab, "dtype": self.dtype}

    def __str__(self):
        return f"{self.tokens}x{self.depth}x{self.vocab} {self.dtype}"


# D and V of each model's own config.json
MODELS = {
    "qwen2.5-0.5b": (896, 151_936),
    "llama-3.2-1b": (2048, 128_256),
    "qwen3-8b": (4096, 151_936),
    "gemma-3-4b": (2560, 262_208),
}
TINY = Shape(length=16, depth=32, vocab=1009)
_UNIT = 64  # tokens: whole groups of eight for every workload


def parse(text, tokens) -> Shape:
    """A model's name, or TOKENSxDxV; raises ValueError for anything else."""
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
        tokens, depth, vocab = map(int, found.groups())
        if tokens < _UNIT or tokens % _UNIT or depth < 8 or vocab < 64:
            raise ValueError(f"TOKENSxDxV needs tokens in multiples of {_UNIT}, D >= 8 and V >= 64, got {text}")
    elif text.lower() in MODELS:
        depth, vocab = MODELS[text.lower()]
    else:
        raise ValueError(unknown(text, [*MODELS, "TOKENSxDxV"]))
    return Shape(depth=depth, vocab=vocab).of(tokens)


def unknown(name, known) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"unknown name {name!r}{meant}; known are {', '.join(known)}"


def named(shape) -> str:
    """How a table calls it, from the fields of a row."""
    head = (shape["depth"], shape["vocab"])
    name = next((name for name, known in MODELS.items() if known == head), "D {} V {}".format(*head))
    return f"{name}, {shape['tokens']} tokens"
