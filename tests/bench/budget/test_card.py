"""Work that a card copies from the host unseen, which no graph can hold; and that no graph of an engine has any."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import EVERYWHERE, SMALL_TAESANA, random_factors, save_checkpoint, save_decoder, save_lora
from torch import Tensor

from bench.budget.card import Card
from bench.budget.engine import _Trusted
from bench.budget.events import Transfer
from bench.harness.errors import BenchError
from engines import loader
from engines.checkpoints.checkpoint import open_checkpoint
from engines.kernels.op import Ops
from engines.models.controlnet import ControlNet
from engines.pipeline.engine import SprintEngine
from engines.types import AdapterOption

CUDA = torch.device("cuda")


def written(x: Tensor, at: Any) -> Tensor:
    x[at] = 3.0
    return x


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (lambda x: x * torch.tensor([1.0, 2.0], device=CUDA), 8),
        (lambda x: x * torch.tensor(2.0, device=CUDA), 4),
        (lambda x: x * torch.as_tensor([1.0, 2.0], device=CUDA), 8),
        (lambda x: x * x.new_tensor([1.0, 2.0]), 8),
        (lambda x: x[[0, 1]], 16),
        (lambda x: x[:, [0, 1]], 16),
        (lambda x: x[torch.tensor([0, 1])], 16),
        (lambda x: written(x, [0, 1]), 16),
        (lambda x: written(x, torch.tensor([0, 1])), 16),
    ],
    ids=["tensor", "number", "as_tensor", "new_tensor", "list", "list of columns", "host index", "to list", "to index"],
)
def test_what_a_card_copies_unseen(work: Callable[[Tensor], Tensor], size: int) -> None:
    card = Card("H100", 132, (9, 0))
    with card.present(), torch.inference_mode():
        x = torch.empty(2, 2, device=CUDA)
        card.clear()
        work(x)
        assert [event for event in card.events if isinstance(event, Transfer)] == [Transfer(size, pinned=False)]
        with pytest.raises(BenchError, match="a graph cannot hold a transfer"):
            card.recorder.record(lambda: (work(x),))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * torch.full((2,), 2.0, device=CUDA),
        lambda x: x[x.argmax(0)],
        lambda x: written(x, slice(1, 2)),
        lambda x: x * torch.as_tensor(x, dtype=torch.float32, device=CUDA),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x[:, None] + x[1],
    ],
    ids=["full", "index there", "slice", "tensor there", "repeat", "views"],
)
def test_what_stays_on_the_card(work: Callable[[Tensor], Tensor]) -> None:
    card = Card("H100", 132, (9, 0))
    with card.present(), torch.inference_mode():
        x = torch.empty(2, 2, device=CUDA)
        card.clear()
        card.recorder.record(lambda: (work(x),))


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp8"])
def test_every_graph_of_an_engine_can_be_captured(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drawings, adapters, a second decoder, and a size whose positions are made in the graph."""
    model = save_checkpoint(tmp_path / "sprint", interpolation_scale=0.5)
    settings = {"default_size": [64, 64], "sizes": [[64, 64], [64, 32]], "max_prompt_tokens": 40}
    (model / "sprint.json").write_text(json.dumps(settings))
    transformer = open_checkpoint(str(model)).load_transformer(torch.float32, torch.device("cpu"))
    branch = ControlNet.of(transformer, 1)
    (model / "controlnet").mkdir()
    (model / "controlnet" / "config.json").write_text(json.dumps(branch.config.to_dict()))
    save_file(branch.state_dict(), model / "controlnet" / "diffusion_pytorch_model.safetensors")
    adapter = save_lora(tmp_path / "one.safetensors", random_factors(transformer, EVERYWHERE, 3, 1))
    card = Card("H100", 132, (9, 0))
    monkeypatch.setattr(loader, "_pool", lambda *_: None)  # other threads do not see the card
    with card.present():
        engine = loader.load_engine(
            str(model),
            backend="cuda-graph",
            device="cuda",
            precision=precision,
            max_batch=2,
            recorder=card.recorder,
            native=_Trusted(Ops(card.launcher), open_checkpoint(str(model)).autoencoder),
            controlnet=str(model / "controlnet"),
            fast_decoder=str(save_decoder(tmp_path / "second", SMALL_TAESANA)),
            lora=[AdapterOption("one", str(adapter))],
        )
        engine.warmup()
    assert isinstance(engine, SprintEngine)
    assert engine._runners is not None
    made = engine._runners
    assert made.controlled is not None
    assert made.fast_decode is not None
    for runner in (made.plain, made.controlled, made.decode, made.fast_decode, made.png):
        assert runner.ready
