"""The C with which Triton launches kernels, compiled ahead of time for hosts without a C compiler.

Two libraries: Triton's own module cuda_utils, which Triton otherwise compiles before its first launch, and a libcuda
that does nothing, with which engines are built on a machine without a GPU. A container image gets both at its build:

    python -m engines.kernels.launch_code        into FOLDER, where every process looks for them

Kernels themselves need no C compiler, because Triton brings LLVM and ptxas.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from engines.errors import BuildError

FOLDER = Path(__file__).parent / "compiled"
COMPILERS = ("gcc", "clang")  # that Triton looks for
MODULE, LIBCUDA = "cuda_utils.so", "libcuda.so.1"

# The functions whose results Triton reads before a launch. Every other function of libcuda does nothing and succeeds.
_STUB = """
static int place, shared_memory, launched;
void simulate(int bytes) { shared_memory = bytes; }
int launches(void) { return launched; }
int cuDeviceGetAttribute(int *value) { *value = shared_memory; return 0; }
int cuFuncGetAttribute(int *value, int which) { *value = which ? 0 : 1024; return 0; }  /* 0: threads of a program */
int cuPointerGetAttribute(void **value, int which, void *pointer) { *value = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = &place; return 0; }
int cuModuleLoadData(void **module) { *module = &place; return 0; }
int cuModuleGetFunction(void **function) { *function = &place; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "none"; return 0; }
int cuLaunchKernelEx(void) { launched++; return 0; }
"""


def c_compiler() -> str:
    """Returns the path of a C compiler that Triton looks for. Raises BuildError without one."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError("build: no C compiler is found, and kernels are launched through C; install gcc and try again")


def check_c() -> None:
    """Raises BuildError if there is neither a C compiler nor what it would compile."""
    if compiled_folder() is None:
        c_compiler()


def compiled_folder() -> Path | None:
    """Returns the folder of both libraries for this Triton and this Python, if FOLDER has it. Imports no Triton."""
    if not FOLDER.is_dir() or find_spec("triton") is None:
        return None
    folder = FOLDER / _digest()
    return folder if all((folder / name).is_file() for name in (MODULE, LIBCUDA)) else None


def load_compiled_module() -> None:
    """Makes Triton load its C module from FOLDER, if it is there, instead of compiling it into its cache.

    Docker mounts a tmpfs without the right to execute, so a library in a cache below /tmp cannot be loaded.
    """
    folder = compiled_folder()
    if folder is None:
        return
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    configured, module = knobs.cache.manager_class or FileCacheManager, str(folder / MODULE)

    class WithModule(configured):  # type: ignore[misc,valid-type]  # a class known at run time only
        def get_file(self, filename: str) -> str | None:
            if filename.startswith(f"{Path(MODULE).stem}."):
                return module
            path: str | None = super().get_file(filename)
            return path

    knobs.cache.manager_class = WithModule


def copy_compiled_module() -> None:
    """Makes Triton copy its C module from FOLDER, if it is there, into the cache of a build: an engine holds it."""
    folder = compiled_folder()
    if folder is None:
        return
    from triton import knobs

    def module(name: str, *_: object) -> str:
        path = folder / f"{name}.so"
        if not path.is_file():  # of another backend than NVIDIA's
            raise BuildError(f"kernels: Triton needs {name} compiled, and {FOLDER} has only {MODULE}")
        return str(path)

    build: Callable[..., str] = module
    knobs.build.impl = build


def stub_libcuda(folder: Path) -> Path:
    """Returns a libcuda.so.1 with which Triton links and launches without a GPU: FOLDER's, or one made in `folder`.

    Raises BuildError.
    """
    compiled = compiled_folder()
    return _compiled_stub(folder) if compiled is None else compiled / LIBCUDA


def _compiled_stub(folder: Path) -> Path:
    compiler, nvidia = c_compiler(), _nvidia()
    named = set(re.findall(r"\bcu[A-Z]\w+\b", (nvidia / "driver.c").read_text() + (nvidia / "driver.py").read_text()))
    own = set(re.findall(r"\bcu[A-Z]\w+\b", _STUB))
    rest = "\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(named - own) if not name.endswith("_t"))
    source, library = folder / "libcuda.c", folder / LIBCUDA
    source.write_text(f"{_STUB}{rest}\n")
    command = [compiler, "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBCUDA}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    source.unlink()
    if done.returncode:
        raise BuildError(f"build: {compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    return library


def _nvidia() -> Path:
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia"


def _digest() -> str:
    """Returns a name for what both libraries depend on: Triton's C, Python's ABI and the stub."""
    sources = (_nvidia() / "driver.c").read_bytes(), str(sys.implementation.cache_tag).encode(), _STUB.encode()
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


def compile_both() -> Path:
    """Compiles both libraries into FOLDER and returns their folder. Raises BuildError."""
    from triton.runtime.build import _build

    nvidia, folder = _nvidia(), FOLDER / _digest()
    folder.mkdir(parents=True, exist_ok=True)
    _compiled_stub(folder)
    with tempfile.TemporaryDirectory() as scratch:
        linked = [str(folder), str(nvidia / "lib")]
        try:
            built = _build(
                "cuda_utils", str(nvidia / "driver.c"), scratch, linked, [str(nvidia / "include")], [LIBCUDA], []
            )
        except subprocess.CalledProcessError as error:
            raise BuildError(f"build: Triton's driver.c was not compiled: {error}") from error
        shutil.copyfile(built, folder / MODULE)
    return folder


def main() -> int:
    if find_spec("triton") is None:
        print("Triton is not installed, so nothing is compiled")
        return 0
    try:
        print(compile_both())
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
