"""Triton's keys of compiled kernels, equal in every process: what one compiles, another finds in the cache."""

import importlib
import pkgutil
import platform

from triton.runtime import build
from triton.runtime.jit import JITFunction

import engines.kernels


def stable_cache_keys() -> None:
    """Makes Triton's keys the same in every process that calls this before its first launch.

    Triton's key of compiled C holds platform.architecture, which depends on the presence of the program `file`. Its key
    of a kernel holds the constants of functions that already have a key (DependenciesFinder._update_hash); so all
    functions get one here, in one order.
    """
    build.platform_key = lambda: f"{platform.machine()},{platform.system()}"
    names = [module.name for module in pkgutil.walk_packages(engines.kernels.__path__, "engines.kernels.")]
    for module in map(importlib.import_module, sorted(names)):
        for _, value in sorted(vars(module).items()):
            if isinstance(value, JITFunction):
                _ = value.cache_key
