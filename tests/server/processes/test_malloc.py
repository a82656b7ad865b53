"""The malloc configuration, in a process of its own, since it cannot be undone."""

import platform

import pytest
from program import Program

PROBE = """
import os, ctypes, threading
from server.processes.malloc import configure_malloc
print(configure_malloc(os.environ))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc_stats.restype = None
SIZE = 16 * 2**20

def work():
    array = libc.malloc(SIZE)
    ctypes.memset(array, 1, SIZE)
    libc.free(array)

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

ctypes.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resident()
for _ in range(4):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(round((resident() - before) / SIZE))
libc.malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which cannot be told")
@pytest.mark.parametrize(
    ("environment", "chosen", "kept", "arenas"),
    [({}, "True", 1, 1), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False", 0, 2)],
)
def test_one_arena_keeps_what_was_used_unless_the_environment_says_otherwise(
    environment: dict[str, str], chosen: str, kept: int, arenas: int
) -> None:
    program = Program("-c", PROBE, **environment)
    assert program.wait_end() == 0, program.output
    assert program.output.split()[:2] == [chosen, str(kept)]
    assert (program.output.count("Arena ") > 1) == (arenas > 1)
