"""Reference figures for the server: a request counted by bench.budget, and diffusers.

Each runs in a fresh process, because the server needs the card's memory before and after.
"""

from itertools import islice
from typing import Any

import torch

from bench.acceptance.over_http.client import fresh_prompts
from bench.budget.engine import count_request
from bench.budget.totals import document
from bench.harness.pipelines import DiffusersPipeline, Workload
from bench.harness.summary import percentiles
from engines.checkpoints.checkpoint import open_checkpoint


def count(model: str, size: tuple[int, int], precision: str) -> dict[str, Any]:
    """Counts one request of a prompt of 20 tokens with bench.budget."""
    return document(count_request(model, "cuda-graph", size, 1, 1, 20, precision=precision))


def measure_peer(peer: str, model: str, precision: str, device: str, runs: int) -> dict[str, Any]:
    """Measures diffusers' pipeline in milliseconds by stage, after three uncounted runs."""
    checkpoint = open_checkpoint(model)
    rival = DiffusersPipeline(checkpoint, precision, torch.device(device), compiled=peer == "diffusers-compiled")
    width, height = checkpoint.settings.default_size
    prompts = fresh_prompts(checkpoint, 20)
    made = [rival.run(Workload([prompt], [0], width, height, 1)) for prompt in islice(prompts, runs + 3)][3:]
    stages = made[0].seconds
    return {"ms": {stage: percentiles([one.seconds[stage] * 1e3 for one in made]) for stage in stages}, **rival.facts}
