"""Loads torch's C++ libraries while Python imports the server.

`import torch` keeps the interpreter's lock while the dynamic linker loads them and their operators register, 0.3 s of a
start. A call through ctypes releases the lock (https://docs.python.org/3/library/ctypes.html#ctypes.PyDLL).
"""

import ctypes
import sys
import threading
from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path

LIBRARY = Path("lib", "libtorch.so")  # needs the libraries of CPU and CUDA, and nothing of Python
# torch's switch for extensions that other packages register; it then searches the metadata of every package for them.
EXTENSIONS = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def load_torch_library(environment: MutableMapping[str, str]) -> threading.Thread | None:
    """Loads the libraries on a thread, and returns it; None without torch or such a file.

    Turns off extensions of torch unless `environment` says otherwise. A library that cannot be loaded is ignored here,
    as `import torch` says why. Call it after configure_malloc and configure_openmp.
    """
    environment.setdefault(EXTENSIONS, "0")
    torch = find_spec("torch")
    path = None if torch is None or torch.origin is None else Path(torch.origin).parent / LIBRARY
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None)
    if path is None or dlopen is None or not path.is_file():
        return None
    dlopen.restype = ctypes.c_void_p
    arguments = (str(path).encode(), sys.getdlopenflags())
    thread = threading.Thread(target=dlopen, args=arguments, name="torch library")
    thread.start()
    return thread
