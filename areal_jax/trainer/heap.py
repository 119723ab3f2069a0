"""Gives the holes in the one heap of a trainer on CPUs back to the kernel, when the heap has grown. Knows no jax.

The launcher has glibc keep what XLA's buffers leave (`launch.roles.KEEP_BUFFERS`). Now and then a small object that
stays makes a hole too small for the next buffer: then the heap grows by another, and without this would keep both.
"""

import ctypes
import os

GROWN = 8 << 20  # bytes; to give back costs the page faults of one step, so not for less


class Heap:
    """`tidy` it from time to time. Does nothing where the allocator is not glibc's with one heap that it keeps."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        kept = os.environ.get("MALLOC_ARENA_MAX") == "1" and os.environ.get("MALLOC_MMAP_MAX_") == "0"
        self._libc = libc if kept and hasattr(libc, "malloc_trim") else None
        self._end = 0  # of the heap, when its holes were given back last
        if self._libc is not None:
            self._libc.sbrk.restype, self._libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
            self._libc.malloc_trim.argtypes = [ctypes.c_size_t]

    def tidy(self) -> bool:
        """Gives back the pages of all holes if the heap has grown by more than `GROWN` since; whether it did."""
        if self._libc is None or (end := self._libc.sbrk(0)) <= self._end + GROWN:
            return False
        self._libc.malloc_trim(1 << 40)  # but not the heap's end, which would then have to grow again
        self._end = end
        return True
