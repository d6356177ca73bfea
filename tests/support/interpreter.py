"""Triton's interpreter as the tests need it: rounding like a GPU, products whose bits have no place, and faster."""

import functools
import inspect

import numpy as np
import torch


def mend():
    """Changes the interpreter of this process; does nothing where Triton is not installed."""
    try:
        from triton import language
        from triton.language import semantic
        from triton.runtime import interpreter
    except ImportError:
        return
    _round_to_nearest(interpreter, language)
    _sum_in_float64(interpreter)
    _patch_once_per_launch(interpreter, language)
    _shapes_once(language.core, semantic.TritonSemantic)
    _dtypes_once(interpreter, language)


def _round_to_nearest(interpreter, language):
    """The interpreter cuts the mantissa of a bfloat16 off; a GPU rounds to nearest, ties to even."""
    convert = interpreter._convert_float

    def rounding(value, source, target, mode):
        if (source, target) != (language.float32, language.bfloat16):
            return convert(value, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy().reshape(value.shape)

    interpreter._convert_float = rounding


def _sum_in_float64(interpreter):
    """An element of a float32 product by numpy has other bits in another place of the tile on some CPUs; a GPU's has not."""
    dot = interpreter.InterpreterBuilder.create_dot

    def rounded_once(self, a, b, d, *more):
        if not (a.data.dtype == b.data.dtype == d.data.dtype == np.float32):
            return dot(self, a, b, d, *more)
        found = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32) + d.data
        return interpreter.TensorHandle(found, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = rounded_once


def _patch_once_per_launch(interpreter, language):
    """Each call of one jitted function by another patches triton.language again: half of the time of a small launch."""
    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.cache
    def languages_of(fn):
        return {id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (language, language.core)}

    def patch_once(fn):
        languages = languages_of(fn)
        if not languages <= done:
            done.update(languages)
            return patch(fn)
        return None

    def launched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launched


def _shapes_once(core, semantic):
    """Each tensor makes its shape anew, number by number, and each operation compares those of its two: a third of the time."""
    init, broadcast, known = core.tensor.__init__, semantic.broadcast_impl_value, {}

    def made(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[sizes]
        else:
            init(self, handle, type)
            known[sizes] = self.shape, self.numel

    def broadcast_unless_equal(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and list(lhs.type.shape) == list(rhs.type.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.tensor.__init__, semantic.broadcast_impl_value = made, broadcast_unless_equal


def _dtypes_once(interpreter, language):
    """Each operation makes the table of numpy's dtypes anew."""
    find, known = interpreter._get_np_dtype, {}

    def found(dtype):
        if isinstance(dtype.scalar, language.pointer_type):
            return find(dtype)
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = found
