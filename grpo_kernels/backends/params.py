"""The structs of csrc/params.h, filled in: what `native.py` and `cuda.py` hand to compiled kernels after `statistics.check`."""

import ctypes

import torch

from ..losses.terms import KINDS
from . import comparison
from .statistics import has_squares, require

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def struct(name, *members):
    """A C struct of (type, names) in order."""
    fields = [(one, kind) for kind, names in members for one in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


INT, POINTER = ctypes.c_int, ctypes.c_void_p
_INT64, _DOUBLE, _BOOL = ctypes.c_int64, ctypes.c_double, ctypes.c_bool
_Matrix = struct("Matrix", (POINTER, "data"), (_INT64, "rows columns row_stride"), (INT, "dtype"))
_Transform = struct("Transform", (_DOUBLE, "logit_scale softcap temperature"))
_Tile = struct("Tile", (_Matrix, "values"), (POINTER, "target"), (_Transform, "transform"), (POINTER, "bias temperature ranges"))
_Scored = struct("Scored", (POINTER, "logps lse entropy"))
_Rows = struct("PolicyRows", (POINTER, "w_policy advantages old ref w_kl w_entropy"))
_Terms = struct("PolicyTerms", (INT, "kind"), (_DOUBLE, "epsilon_low epsilon_high delta sapo_temperature_pos sapo_temperature_neg"),
                (_BOOL, "use_bias_correction_kl"))  # fmt: skip
_Statistics = struct("StatisticsParams", (_Tile, "tile"), (POINTER, "stats"), (_INT64, "parts"), (_BOOL, "squares"))
_Close = struct("CloseParams", (POINTER, "stats"), (_INT64, "rows parts"), (INT, "dtype"), (_Scored, "scored"),
                (POINTER, "squared"))  # fmt: skip
_Gradient = struct("GradientParams", (_Tile, "tile"), (_Matrix, "out"), (_Scored, "scored"), (POINTER, "g g_entropy"))
_Policy = struct("PolicyParams", (_Tile, "tile"), (_Matrix, "out"), (_Rows, "rows"), (_Terms, "terms"), (_Scored, "scored"))
_Pairs = struct("Pairs", (POINTER, "ids ranges rows"), (_INT64, "count"))
_PairLogits = struct("PairLogitsParams", (_Pairs, "pairs"), (_Matrix, "hidden weight"), (POINTER, "bias out"), (_DOUBLE, "scale"),
                     (_BOOL, "add"))  # fmt: skip
_PairSums = struct("PairSumsParams", (_Pairs, "pairs"), (POINTER, "g"), (_Matrix, "source out"), (_DOUBLE, "scale"), (_BOOL, "add"))
_TwoTiles = struct("TwoTiles", (_Tile, "student teacher"))
_Compared = struct("Compared", (POINTER, "gap own value"))
_Comparison = struct("ComparisonParams", (_TwoTiles, "tiles"), (POINTER, "stats"), (INT, "kind"))
_JensenShannon = struct("JensenShannonParams", (_TwoTiles, "tiles"), (_Scored, "scored"), (POINTER, "gap sums"),
                        (_DOUBLE, "beta"))  # fmt: skip
_DivergenceGradient = struct("DivergenceGradientParams", (_TwoTiles, "tiles"), (_Matrix, "out"), (_Scored, "scored"),
                             (_Compared, "compared"), (POINTER, "g_divergence g g_entropy"), (INT, "kind"),
                             (_DOUBLE, "beta"))  # fmt: skip
_Divergence = struct("DivergenceParams", (_TwoTiles, "tiles"), (_Matrix, "out"), (POINTER, "g_divergence"), (INT, "kind"),
                     (_DOUBLE, "beta"), (_Scored, "scored"), (_Compared, "compared"))  # fmt: skip
_Product = struct("ProductParams", (_Matrix, "a b out"), (_BOOL, "a_transposed b_transposed add continued"), (_DOUBLE, "alpha"))
_Transpose = struct("TransposeParams", (_Matrix, "matrix"), (POINTER, "out"))


def statistics(tile, stats):
    return _Statistics(_tile(tile), _at(stats), 1 if stats.dim() == 2 else stats.shape[1], has_squares(stats))


def close(stats, scored, squared=None):
    parts = 1 if stats.dim() == 2 else stats.shape[1]
    return _Close(_at(stats), stats.shape[0], parts, _DTYPES.index(stats.dtype), _scored(scored), _at(squared))


def gradient(tile, out, scored, g, g_entropy=None):
    where = _tile(tile)
    return _Gradient(where, where.values if tile.ranges is not None else _matrix(out), _scored(scored), _at(g), _at(g_entropy))


def policy(tile, out, rows, terms, scored):
    if terms.kind not in KINDS:
        raise AssertionError(f"terms.kind must be one of {', '.join(KINDS)}, got {terms.kind!r}")
    require(terms.kind == "linear" or rows.w_policy is None or rows.advantages is not None, "advantages are missing")
    require(rows.ref is None or rows.w_kl is not None, "w_kl is missing")
    vectors = _Rows(*(_at(getattr(rows, name)) for name, _ in _Rows._fields_))
    constants = (getattr(terms, name) for name, _ in _Terms._fields_[1:])
    return _Policy(_tile(tile), _matrix(out), vectors, _Terms(KINDS.index(terms.kind), *constants), _scored(scored))


def pair_logits(pairs, hidden, weight, out, scale, bias, add):
    return _PairLogits(_pairs(pairs), _matrix(hidden), _matrix(weight), _at(bias), _at(out), scale, add)


def pair_sums(pairs, g, source, out, scale, add):
    return _PairSums(_pairs(pairs), _at(g), _matrix(source), _matrix(out), scale, add)


def divergence_statistics(student, teacher, stats, kind):
    return _Comparison(_two_tiles(student, teacher), _at(stats), comparison.KINDS.index(kind))


def jensen_shannon(student, teacher, scored, gap, sums, beta):
    return _JensenShannon(_two_tiles(student, teacher), _scored(scored), _at(gap), _at(sums), beta)


def divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g=None, g_entropy=None):
    tiles, kind = _two_tiles(student, teacher), comparison.KINDS.index(divergence.kind)
    where = tiles.student.values if student.ranges is not None else _matrix(out)
    return _DivergenceGradient(tiles, where, _scored(scored), _Compared(*map(_at, compared)), _at(g_divergence), _at(g),
                               _at(g_entropy), kind, divergence.beta)  # fmt: skip


def divergence(student, teacher, out, g_divergence, divergence, scored, compared):
    kind = comparison.KINDS.index(divergence.kind)
    return _Divergence(_two_tiles(student, teacher), _matrix(out), _at(g_divergence), kind, divergence.beta, _scored(scored),
                       _Compared(*map(_at, compared)))  # fmt: skip


def transpose(matrix, out):
    return _Transpose(_matrix(matrix), _at(out))


def product(a, b, out, add, continued, alpha):
    (a, a_transposed), (b, b_transposed) = _either_way(a), _either_way(b)
    return _Product(a, b, _matrix(out), a_transposed, b_transposed, add, continued, alpha)


def _at(tensor):
    return None if tensor is None else tensor.data_ptr()


def _matrix(x):
    return _Matrix(x.data_ptr(), *x.shape, x.stride(0), _DTYPES.index(x.dtype))


def _either_way(x):
    """The matrix whose columns are adjacent, x or its transpose, and which one it is."""
    turned = x.shape[1] > 1 and x.stride(1) != 1
    return _matrix(x.T if turned else x), turned


def _tile(tile):
    t, values = tile.transform, tile.values
    transform = _Transform(t.logit_scale, t.softcap or 0.0, t.temperature)
    if tile.ranges is None:
        matrix = _matrix(values)
    else:
        matrix = _Matrix(values.data_ptr(), tile.ranges.shape[0], values.shape[0], 0, _DTYPES.index(values.dtype))
    return _Tile(matrix, _at(tile.target), transform, _at(tile.bias), _at(tile.temperature), _at(tile.ranges))


def _two_tiles(student, teacher):
    return _TwoTiles(_tile(student), _tile(teacher))


def _pairs(pairs):
    return _Pairs(_at(pairs.ids), _at(pairs.ranges), _at(pairs.rows), pairs.ranges.shape[0])


def _scored(scored):
    return _Scored(*map(_at, scored))
