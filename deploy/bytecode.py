"""Imports what a start of the server imports, so that Python keeps the bytecode in the image.

    PYTHONPATH=. python deploy/bytecode.py

Packages come without bytecode, and a container with a read-only root cannot keep any: without this, each start compiles
1,600 modules.
"""

from importlib import import_module
from importlib.util import find_spec

SERVER = (
    "server.__main__",
    "server.app",
    "server.processes.supervisor",
    "server.processes.worker",
    "engines.loader",
    "engines.artifacts.candidates",
)
# Package -> what loads it, or the package itself if only an option does.
BY_PACKAGE = {"triton": ("engines.artifacts.native.loading", "engines.pipeline.native"), "openvino": ("openvino",)}


def main() -> None:
    names = [*SERVER]
    for package, loaders in BY_PACKAGE.items():
        names += loaders if find_spec(package) else ()
    for name in names:
        import_module(name)


if __name__ == "__main__":
    main()
