"""Kernels have the same keys in each process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_MAKES_A_BACKEND = """
import pkgutil, sys
from importlib import import_module
from pathlib import Path
import torch
from triton.runtime.jit import JITFunction
import engines.kernels
from bench.budget.card import Card
from engines.checkpoints.checkpoint import open_checkpoint
from engines.pipeline.native import NativeBackend
autoencoder = open_checkpoint("random:sprint-0.6b").autoencoder
with Card("H100", 132, (9, 0)).present():
    NativeBackend.on(torch.device("cuda", 0), autoencoder, Path(sys.argv[1]), "")
names = [found.name for found in pkgutil.walk_packages(engines.kernels.__path__, "engines.kernels.")]
kernels = [value for name in names for value in vars(import_module(name)).values() if isinstance(value, JITFunction)]
print(len(kernels), sum(kernel.hash is None for kernel in kernels))
"""


def test_a_backend_on_a_card_gives_every_kernel_its_key_before_the_first_launch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _MAKES_A_BACKEND, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels, without_key = map(int, done.stdout.split())
    assert kernels > 20
    assert without_key == 0
