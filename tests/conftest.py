"""Where no NVIDIA card is, Triton's interpreter runs the kernels: asked for before anything imports Triton, whose own
functions are interpreted or compiled as the environment says at that moment."""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"
