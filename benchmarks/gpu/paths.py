"""Parts `paths`, the main table, and `shapes`, other heads: every provider on every path, or ours and the products on two."""

import gc
import time
from dataclasses import replace

from grpo_kernels.bench.shapes import TINY, Shape

from .context import row
from .inputs import PATHS, make_base
from .measure import measure, shape_of
from .providers import everybody, our_backends, ours

SHAPES = ((896, 151_936), (2048, 151_936), (2048, 128_256), (4096, 128_256), (2048, 262_144), (4096, 262_144))  # D, V
TINY_SHAPES = ((16, 1009), (48, 511))


def main_shape(options) -> Shape:
    if options.tiny:
        return TINY
    return Shape(options.sequences, options.tokens // options.sequences, options.depth, options.vocab)


def run_paths(context):
    names = [name for name in PATHS if not options_of(context, "paths") or name in options_of(context, "paths")]
    _measure(context, main_shape(context.options), names, _chosen(context, everybody(context.device)))


def run_shapes(context):
    providers = _chosen(context, [ours(our_backends(context.device)[0])])
    shapes = TINY_SHAPES if context.options.tiny else SHAPES
    for i, (depth, vocab) in enumerate(shapes):
        shape = replace(main_shape(context.options), depth=depth, vocab=vocab)
        share = context.left() / (len(shapes) - i)
        _measure(context, shape, ("one_pass", "logprobs"), providers, time.monotonic() + share)


def options_of(context, name):
    value = getattr(context.options, name)
    return value.split(",") if value else []


def _chosen(context, providers):
    wanted = options_of(context, "providers")
    return [p for p in providers if not wanted or p.name in wanted]


def _measure(context, shape, names, providers, until=None):
    until = until or context.deadline
    base = make_base(shape, context.device)
    for i, name in enumerate(names):
        share = max(0.0, until - time.monotonic()) / (len(names) - i)
        start = time.monotonic()
        with context.attempt(row("inputs", name, shape_of(shape), peer=False)):
            measure(context, base, PATHS[name], providers, start + share)
        print(f"{shape} {name}: {time.monotonic() - start:.0f} s", flush=True)
    del base
    gc.collect()
    context.clock.recover()
