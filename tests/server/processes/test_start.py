"""A process that starts: torch's libraries load beside the imports, no collections, nothing imported in vain."""

import pytest
from program import Program

LIBRARY = """
import os, sys
from server.processes.torch_library import load_torch_library
thread = load_torch_library(os.environ)
thread.join()
print('torch' in sys.modules, 'libtorch_cpu.so' in open('/proc/self/maps').read())
import torch
print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'], int(torch.ones(2).sum()))
"""
COLLECTOR = """
import gc
from server.processes.garbage import pause_collector, resume_collector
resume_collector()
print(gc.isenabled(), gc.get_freeze_count() > 0)
pause_collector()
print(gc.isenabled())
resume_collector()
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
SERVES = """
import sys
import server.app, server.processes.uvicorn_server
from engines.types import Job
from server.loading.engine_loader import load
from server.settings import load_settings
engine = load(load_settings(['--model', 'tiny', '--device', 'cpu'], {}))
engine.warmup()
engine.generate([Job('a red circle', 7, *engine.limits.default_size)])
print('loaded', *sorted({name.partition('.')[0] for name in sys.modules} | {
    name for name in sys.modules if name.startswith('torch.') and name.count('.') == 1
}))
"""
# Packages, and parts of torch that `import torch` leaves out: seconds of a start each, and no image needs them.
UNUSED = {
    *("transformers", "accelerate", "diffusers", "scipy", "torchvision", "onnx", "openvino", "sympy", "networkx"),
    *("huggingface_hub", "requests", "matplotlib", "pandas", "ray", "triton", "torch._dynamo", "torch._inductor"),
}


@pytest.mark.parametrize(("environment", "switch"), [({}, "0"), ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}, "1")])
def test_torch_s_libraries_load_without_torch(environment: dict[str, str], switch: str) -> None:
    program = Program("-c", LIBRARY, **environment)
    program.exit_timeout_s = 180.0
    assert program.wait_end() == 0, program.output
    assert program.output.split() == ["False", "True", switch, "2"]


def test_the_collector_sleeps_during_the_start_and_leaves_its_objects_alone() -> None:
    program = Program("-c", COLLECTOR)
    assert program.wait_end() == 0, program.output
    assert program.output.split() == ["True", "False", "False", "True", "True"]


def test_serving_an_image_imports_nothing_in_vain() -> None:
    program = Program("-c", SERVES)
    program.exit_timeout_s = 180.0
    assert program.wait_end() == 0, program.output
    line = next(line for line in program.output.splitlines() if line.startswith("loaded "))
    assert "torch" in line.split()
    assert UNUSED & set(line.split()) == set()
