"""That each kernel equals its reference on this card: found once, kept in a file, and found anew when anything changes.

What counts is the card, the versions of torch and Triton, the kernels' own sources, and what shapes they are run at.
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
    """Where the proof for `device` lies in `folder`; shapes: architecture, sizes and precision in words."""
    card = torch.cuda.get_device_properties(device)
    digest = hashlib.sha256(f"{card.name} {card.major}.{card.minor} {torch.__version__} {triton.__version__}".encode())
    digest.update(shapes.encode())
    for path in sorted(path for folder_of_sources in _SOURCES for path in folder_of_sources.rglob("*.py")):
        digest.update(path.read_bytes())
    return folder / f"kernels-{digest.hexdigest()[:24]}.json"


def compare(ops: Ops, work: Callable[[], object], proof: Path | None) -> Mapping[str, str]:
    """What is replaced by its reference, and why. Runs `work` and compares, unless `proof` says what came of it before;
    it is written otherwise. None: no proof is kept."""
    if proof is not None and proof.is_file():
        ops.replaced.update(json.loads(proof.read_text()))
        return ops.replaced
    ops.compare(work)
    if any(NO_COMPILER in why for why in ops.replaced.values()):  # says nothing of the kernels, so it is not kept
        logger.warning(
            "kernels: Triton finds no C compiler for its launchers, so PyTorch runs in their place, several times "
            "slower; give --engine a folder of build_engine.py --vendor native, which needs none"
        )
        return ops.replaced
    if proof is not None:
        try:
            _write(proof, json.dumps(ops.replaced))
        except OSError as error:  # a read-only container, a full disk: the next start compares again
            logger.warning("kernels: what was found equal cannot be kept in %s: %s", proof, error)
    return ops.replaced


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
