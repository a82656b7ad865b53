"""A valid manifest of engines for this CPU; tests replace single fields."""

from engines.artifacts.manifest import Manifest

MANIFEST = Manifest(
    checkpoint="tiny",
    checkpoint_sha256="ab" * 32,
    decoder=None,
    gpu="cpu",
    device="a CPU",
    compute_capability=None,
    driver=None,
    backend="openvino",
    vendor="openvino",
    precision="fp32",
    sizes=((64, 64),),
    batches=(1, 2),
    steps=(1,),
    tokens=300,
    versions={"openvino": "2026.1"},
    executed=True,
    command="python build_engine.py",
    fingerprint="cd",
    seconds=1.0,
    pictures={},
    references={},
    artifacts=(),
)
