"""Compiles kernels without their GPU, by launches on the meta device that run nothing.

In offline mode a process launches kernels through Triton's own driver on a stub of libcuda. All that a launch compiles
lands in Triton's cache: kernels, Triton's utilities in C, and (Triton 3.6) a launcher for each signature. A machine
with a GPU has loaded its own libcuda as well, which Triton's launchers find first; so they are made, but not called.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from engines.errors import BuildError
from engines.kernels.cache_keys import stable_cache_keys
from engines.kernels.launch_code import copy_compiled_module
from engines.kernels.op import Launcher

# Compute capability -> shared memory of a program in bytes, number of processors.
CARDS = {(9, 0): (232448, 132), (8, 9): (101376, 128)}


def enter_offline_mode(
    libcuda: Path, capability: tuple[int, int], cache: Path | None = None, calls_launchers: bool = False
) -> Callable[[], int]:
    """Makes this process launch kernels for `capability` without running them, until it ends.

    libcuda: of engines.kernels.launch_code.stub_libcuda. cache: folder for compiled kernels; None keeps Triton's own.
    calls_launchers: Triton's launchers call the stub, for tests on a machine without a GPU. Returns a function that
    counts the calls. Raises BuildError.
    """
    if knobs.runtime.interpret:
        raise BuildError("build: TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    stable_cache_keys()
    copy_compiled_module()
    stub = ctypes.CDLL(str(libcuda), mode=ctypes.RTLD_GLOBAL)
    stub.simulate(CARDS[capability][0])
    knobs.nvidia.libcuda_path = str(libcuda.parent)
    if cache is not None:
        knobs.cache.dir = str(cache)
    knobs.compilation.store_binary_only = True
    from triton.backends.nvidia.driver import CudaDriver

    try:
        cuda: Any = CudaDriver()
    except Exception as error:  # of a C compiler, a linker or the loader
        raise BuildError(f"build: Triton {triton.__version__} finds no way to launch: {error}") from error
    cuda.get_current_device = lambda: 0
    cuda.get_current_stream = lambda _: 0
    cuda.get_device_capability = lambda _: capability
    if not calls_launchers:
        made_only: Any = type("MadeOnly", (cuda.launcher_cls,), {"__call__": lambda *_, **__: None})
        cuda.launcher_cls = made_only
    driver.set_active(cuda)
    count: Callable[[], int] = stub.launches
    return count


class ShareLauncher(Launcher):
    """A launcher for one of several processes: it launches every `of`-th distinct signature, once.

    failed: kernel -> reason why it does not fit the GPU; the server runs its reference instead.
    """

    def __init__(self, capability: tuple[int, int], index: int = 0, of: int = 1):
        super().__init__(tma=capability >= (9, 0), processors=CARDS[capability][1])
        object.__setattr__(self, "failed", {})
        object.__setattr__(self, "_seen", set())
        object.__setattr__(self, "_turn", (index, of))

    failed: dict[str, str]
    _seen: set[object]
    _turn: tuple[int, int]

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = (
            kernel.__name__,
            *map(_signature, args),
            *((name, str(value)) for name, value in sorted(constants.items())),
        )
        if key in self._seen:
            return
        index, of = self._turn
        mine = len(self._seen) % of == index
        self._seen.add(key)
        if not mine:
            return
        try:
            super().__call__(kernel, grid, *args, **constants)
        except OutOfResources as error:
            self.failed[kernel.__name__] = str(error)


def _signature(arg: Any) -> object:
    """Returns the properties of an argument by which Triton specialises a kernel."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, bool) or arg is None:
        return arg
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    if hasattr(arg, "block_shape"):
        return arg.base.dtype, tuple(arg.block_shape)
    return "float" if isinstance(arg, float) else str(arg)
