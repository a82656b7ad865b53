"""optimum-intel's OVSanaSprintPipeline as a Pipeline: a process in an environment of its own (`make openvino`)."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness.errors import BenchError
from bench.harness.pipelines import GUIDANCE, TimedImages, Workload, build_diffusers_pipeline
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.instruction import INSTRUCTION

CHILD = Path(__file__).with_name("openvino_child.py")
PYTHON = Path(".venvs/openvino/bin/python")
RUNS = Path("runs/openvino")  # holds each checkpoint in the diffusers layout, and its exports


class OpenVinoPipeline:
    """Runs workloads in the child process. Raises BenchError if that ends.

    The first use of a checkpoint writes it to RUNS in bf16 and exports it: minutes, and about 15 GB of disk at the
    published size. int8: weights in 8 bits. static: all shapes fixed to the first workload's.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, int8: bool = False, static: bool = False, python: Path = PYTHON
    ) -> None:
        if not python.exists():
            raise BenchError(f"vs: {python} is absent; make openvino installs optimum-intel there")
        folder = RUNS / checkpoint.weights.sha256()[:16]
        source = folder / "diffusers"
        if not (source / "model_index.json").exists():
            build_diffusers_pipeline(checkpoint, torch.bfloat16, torch.device("cpu")).save_pretrained(source)
        flags = [*(["--int8"] if int8 else []), *(["--static"] if static else [])]
        out = folder / ("openvino-int8" if int8 else "openvino")
        self._precision, self._static = "int8" if int8 else "bf16", static
        self._instruction = INSTRUCTION.split("\n") if checkpoint.settings.instruction else None
        self._max_tokens = checkpoint.settings.max_prompt_tokens
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the child
        self._child = subprocess.Popen(
            [python, CHILD, source, out, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._versions = self._answer()["versions"]
        self.peak_bytes = 0  # of the child, in its last workload

    @property
    def facts(self) -> dict[str, object]:
        backend = "OVSanaSprintPipeline, static shapes" if self._static else "OVSanaSprintPipeline"
        return {"backend": backend, "precision": self._precision, "device": "cpu", "versions": self._versions}

    def run(self, workload: Workload) -> TimedImages:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "images.npy"
            request = {
                "prompts": list(workload.prompts),
                "seeds": list(workload.seeds),
                "width": workload.width,
                "height": workload.height,
                "steps": workload.steps,
                "guidance": GUIDANCE,
                "instruction": self._instruction,
                "max_tokens": self._max_tokens,
                "images": str(file),
            }
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            answer = self._answer()
            self.peak_bytes = answer["peak_bytes"]
            return TimedImages(list(np.load(file)), answer["seconds"])

    def close(self) -> None:
        """Ends the child."""
        self._child.communicate(timeout=60)
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise BenchError(f"vs: optimum-intel's process ended with code {self._child.returncode}: {last[0]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
