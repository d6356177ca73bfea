"""Blocks that a multiprocessor takes at once, by arithmetic: threads and registers, as compute capability 8.0 to 10.0 has them."""

# of one multiprocessor: threads, and 32-bit registers, handed out by 256 to a warp
_THREADS, _REGISTERS, _REGISTER_UNIT = 2048, 65536, 256


def blocks_at_once(registers: int, warps: int) -> int:
    """Blocks of so many warps, of so many registers a thread, whose threads and registers fit together."""
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(_THREADS // (32 * warps), _REGISTERS // (of_a_warp * warps))
