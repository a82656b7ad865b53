"""The properties of this machine on which a built engine depends."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def package_versions(*names: str) -> dict[str, str]:
    """Returns name -> version of the installed packages among `names` (as imported)."""
    distributions = {
        "modelopt": "nvidia-modelopt",
        "tensorrt_rtx": "tensorrt-rtx-cu13",
        "torch_tensorrt": "torch-tensorrt",
    }
    installed = {}
    for name in names:
        try:
            installed[name] = version(distributions.get(name, name))
        except PackageNotFoundError:
            continue
    return installed


def expanded(path: Path) -> Path | None:
    """Returns the path with its ~ replaced; None for a user without a home directory."""
    try:
        return path.expanduser()
    except RuntimeError:  # pathlib's
        return None


Capability = tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The CPU, and the first NVIDIA GPU that torch sees."""

    cpu: str
    gpu: str | None = None
    capability: Capability | None = None  # compute capability: 8.9 is (8, 9)
    driver: str | None = None
    memory: float | None = None  # bytes of the GPU

    @property
    def label(self) -> str:
        """Returns the GPU and its compute capability, or "no NVIDIA GPU"."""
        return f"{self.gpu} ({capability_text(self.capability)})" if self.capability else "no NVIDIA GPU"


def this_machine() -> Machine:
    if not torch.cuda.is_available():
        return Machine(_cpu_name())
    card = torch.cuda.get_device_properties(0)
    return Machine(_cpu_name(), card.name, (card.major, card.minor), _driver(), float(card.total_memory))


def why_no_gpu(driver: str | None = None) -> str:
    """Returns why torch sees no GPU, and the remedy. driver: version of the kernel module; None detects it."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a wheel without CUDA; install the one for CUDA (pip install torch=="
            f"{torch.__version__.partition('+')[0]} from PyPI, as requirements-gpu.lock has it), or use --device cpu"
        )
    driver = driver or _driver()
    reason = "no NVIDIA driver is loaded" if driver is None else f"the NVIDIA driver {driver} cannot be used"
    return (
        f"torch {torch.__version__} is a wheel for CUDA {torch.version.cuda} and {reason}; install a driver for that "
        "CUDA, start the container with --gpus all, or use --device cpu"
    )


def capability_text(capability: Capability | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"


def cpu_flags() -> str:
    """Returns the CPU's instruction sets. In a virtual machine, CPUs of one name differ in them."""
    return _cpuinfo("flags")


def _cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    return _cpuinfo("model name", info) or platform.machine()


def _cpuinfo(key: str, info: Path = Path("/proc/cpuinfo")) -> str:
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _driver(version: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Returns the version of the kernel module; None without the file, as in some containers."""
    if not version.exists():
        return None
    words = version.read_text().partition("Module")[2].split()
    return words[0] if words else None
