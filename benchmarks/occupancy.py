"""Blocks that a multiprocessor takes at once, by arithmetic: threads, registers and shared memory.

Source: CUDA C++ Programming Guide, technical specifications per compute capability.
"""

# 32-bit registers, handed out by 256 to a warp
_REGISTERS, _REGISTER_UNIT = 65536, 256
# of one multiprocessor: threads, blocks, and bytes of shared memory; a block takes 1 KiB more than it asks for
_SMALL, _LARGE = (1536, 24, 100 << 10), (2048, 32, 228 << 10)
_LIMITS = {"80": (2048, 32, 164 << 10), "86": (1536, 16, 100 << 10), "89": _SMALL, "90": _LARGE, "100": _LARGE, "120": _SMALL}


def _limits(architecture: str) -> tuple[int, int, int]:
    return _LIMITS[architecture.rstrip("a")]


def blocks_at_once(registers: int, warps: int, shared: int = 0, architecture: str = "80") -> int:
    """Blocks of so many warps, registers a thread and bytes of shared memory that fit together."""
    threads, blocks, memory = _limits(architecture)
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(blocks, threads // (32 * warps), _REGISTERS // (of_a_warp * warps), memory // (shared + 1024))


def occupancy(blocks: int, threads: int, architecture: str) -> float:
    """Share of a multiprocessor's threads that so many blocks fill."""
    return blocks * threads / _limits(architecture)[0]
