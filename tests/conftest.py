"""Selects Triton's interpreter on machines without an NVIDIA GPU, before any import of Triton.

Triton reads the environment when it is imported. Each of several pytest processes uses one core.
"""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
