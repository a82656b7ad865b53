"""Where no NVIDIA card is, Triton's interpreter runs the kernels: asked for before anything imports Triton, whose own
functions are interpreted or compiled as the environment says at that moment. One of several processes that share the
tests takes one core."""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
