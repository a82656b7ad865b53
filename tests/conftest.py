"""Sets the environment of all tests.

Without an NVIDIA card Triton's interpreter runs the kernels; Triton reads its variable when it is imported. Each of
several test processes takes one core.
"""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
