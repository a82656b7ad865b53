"""Checks that each kernel equals its reference on this card, and caches the result in a file.

The file's name depends on the card, the versions of torch and Triton, the kernels' sources and the shapes.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

from engines.kernels.op import Ops

logger = logging.getLogger("engines.backends.cuda")

NO_COMPILER = "Failed to find C compiler"  # Triton's words

_SOURCES = (Path(__file__).parent, Path(__file__).parents[2] / "kernels")


def proof_file(folder: Path, device: torch.device, shapes: str) -> Path:
    """Returns the path of the proof for `device` in `folder`; shapes: architecture, sizes and precision as text."""
    card = torch.cuda.get_device_properties(device)
    digest = hashlib.sha256(f"{card.name} {card.major}.{card.minor} {torch.__version__} {triton.__version__}".encode())
    digest.update(shapes.encode())
    for path in sorted(path for source in _SOURCES for path in source.rglob("*.py")):
        digest.update(path.read_bytes())
    return folder / f"kernels-{digest.hexdigest()[:24]}.json"


def compare(ops: Ops, work: Callable[[], object], proof: Path | None) -> Mapping[str, str]:
    """Returns the operations that their references replace, with reasons.

    Reads the file `proof` if it exists. Otherwise runs `work`, compares each kernel and writes the file; None: no file.
    """
    if proof is not None and proof.is_file():
        ops.replaced.update(json.loads(proof.read_text()))
        return ops.replaced
    ops.compare(work)
    if any(
        NO_COMPILER in why for why in ops.replaced.values()
    ):  # tells nothing about the kernels, so it is not written
        logger.warning(
            "kernels: Triton finds no C compiler for its launchers, so PyTorch runs in their place, several times "
            "slower; give --engine a folder of build_engine.py --vendor native, which needs none"
        )
        return ops.replaced
    if proof is not None:
        try:
            _write(proof, json.dumps(ops.replaced))
        except OSError as error:  # read-only container or full disk: the next start compares again
            logger.warning("kernels: the result of the comparison cannot be written to %s: %s", proof, error)
    return ops.replaced


def _write(path: Path, text: str) -> None:
    """Writes the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
