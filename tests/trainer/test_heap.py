"""The trainer's one heap: what its holes hold goes back to the kernel when it has grown, and only then."""

import ctypes
import os
import subprocess
import sys

import pytest

from areal_jax.launch.roles import KEEP_BUFFERS
from areal_jax.launch.supervisor import ROOT
from areal_jax.trainer.heap import Heap

# A buffer with another object behind it is returned: a hole. Then the heap grows by as much.
PROGRAM = """
import ctypes
from areal_jax.trainer.heap import Heap

libc, size = ctypes.CDLL(None), 32 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def hole():
    buffer, behind = libc.malloc(size), libc.malloc(1 << 20)
    ctypes.memset(buffer, 1, size)
    libc.free(buffer)

heap = Heap()
hole()
full = resident()
print(heap.tidy(), full - resident() > 0.9 * size, heap.tidy(), end=" ")
libc.malloc(size + 100)
print(heap.tidy(), heap.tidy())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this is about glibc's allocator")
def test_holes_are_given_back_whenever_the_heap_has_grown():
    env = os.environ | KEEP_BUFFERS | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "True", "False"]


def test_an_allocator_with_other_settings_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert not Heap().tidy()
