"""The memory plan of engines: every part counts once, with the bytes that loading it takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manifests import MANIFEST
from small_checkpoint import changed_copy, random_factors, save_lora
from torch import nn

from engines.artifacts.manifest import FileRecord
from engines.artifacts.memory import MemoryNeed, PlannedEngine, planned_memory
from engines.checkpoints.checkpoint import open_checkpoint, open_fast_decoder
from engines.checkpoints.controlnet import load_controlnet
from engines.checkpoints.lora import with_adapters
from engines.errors import CheckpointError
from engines.models.lora import AdapterStack, add_adapters
from engines.types import AdapterOption

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[3] / "models/tiny"


def need(engine: PlannedEngine, precision: str | None = None) -> MemoryNeed:
    (one,) = planned_memory([engine], device="cpu", precision=precision).needs
    return one


def bytes_of(*modules: nn.Module | None) -> int:
    return sum(parameter.nbytes for module in modules if module is not None for parameter in module.parameters())


def test_an_equal_text_encoder_counts_once() -> None:
    tiny = open_checkpoint("tiny")
    engines = [PlannedEngine(tiny), PlannedEngine(replace(tiny, name="other"))]
    plan = planned_memory(engines, device="cpu", precision=None)
    first, second = plan.needs
    assert (first.text, second.text) == (bytes_of(tiny.load_text_body(torch.float32, CPU)), 0)
    modules = bytes_of(tiny.load_transformer(torch.float32, CPU), tiny.load_autoencoder(torch.float32, CPU))
    assert first.modules == second.modules == modules
    assert plan.total == first.weights + second.weights + first.activations
    assert plan.fits
    assert plan.lines[1].startswith("other: text encoder shared with an earlier model")
    assert 2 * need(PlannedEngine(tiny), "bf16").weights == first.weights


def test_a_second_decoder_counts_without_its_encoder() -> None:
    tiny = open_checkpoint("tiny")
    plain, both = need(PlannedEngine(tiny)), need(PlannedEngine(tiny, fast_decoder="taesana"))
    taesana = bytes_of(open_fast_decoder(tiny, "taesana").load_pixel_decoder(None, torch.float32, CPU))
    assert both.fast_decoder == taesana > 0
    assert both.weights == plain.weights + taesana
    assert "second decoder" in both.line
    assert "second decoder" not in plain.line
    autoencoder = need(PlannedEngine(open_checkpoint("tiny", "taesana"), fast_decoder=str(TINY / "vae")))
    assert autoencoder.fast_decoder == bytes_of(tiny.load_pixel_decoder(None, torch.float32, CPU))


def test_where_a_taesana_decodes_the_autoencoder_counts_by_its_encoder() -> None:
    checkpoint = open_checkpoint("tiny", "taesana")
    autoencoder = checkpoint.load_autoencoder(torch.float32, CPU)
    decoder = checkpoint.load_pixel_decoder(autoencoder, torch.float32, CPU)
    transformer = checkpoint.load_transformer(torch.float32, CPU)
    assert need(PlannedEngine(checkpoint)).modules == bytes_of(transformer, autoencoder, decoder)


@pytest.mark.parametrize(("decoder", "parameters"), [("taesana", 8_301_763), ("lite", 268_154_124)])
def test_random_weights_count_by_their_shapes(decoder: str, parameters: int) -> None:
    found = need(PlannedEngine(open_checkpoint("random:sprint-0.6b"), fast_decoder=decoder), "bf16")
    assert found.fast_decoder == 2 * parameters


def test_a_published_file_counts_by_its_architecture(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "taesana_decoder.pth")
    fast = str(tmp_path / "taesana_decoder.pth")
    assert need(PlannedEngine(open_checkpoint("tiny"), fast_decoder=fast)).fast_decoder == 4 * 8_301_763


def test_a_controlnet_counts_where_there_is_one(tmp_path: Path) -> None:
    tiny = open_checkpoint("tiny")
    branch = bytes_of(load_controlnet(tiny, None, torch.float32, CPU))
    assert need(PlannedEngine(tiny)).controlnet == branch > 0
    assert need(PlannedEngine(tiny, controlnet=str(TINY / "controlnet"))).controlnet == branch
    bare = tmp_path / "bare"
    bare.mkdir()
    for entry in TINY.iterdir():
        if entry.name != "controlnet":
            (bare / entry.name).symlink_to(entry)
    assert need(PlannedEngine(open_checkpoint(str(bare)))).controlnet == 0


def test_adapters_count_as_their_stacks_and_fused_ones_take_nothing(tmp_path: Path) -> None:
    tiny = open_checkpoint("tiny")
    transformer = tiny.load_transformer(torch.float32, CPU)
    first = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k")
    ranks = {"small": (first[:1], 2), "large": (first, 4)}
    options = []
    for name, (modules, rank) in ranks.items():
        path = save_lora(tmp_path / f"{name}.safetensors", random_factors(transformer, modules, rank, seed=1))
        options.append(AdapterOption.parse(f"{name}={path}"))
    width = transformer.get_submodule(first[0]).weight.shape[0]
    assert isinstance(width, int)
    found = need(PlannedEngine(tiny, lora=options), "bf16").adapters
    assert found == 2 * (2 * 2 * 4 * 2 * width)  # bf16: two modules with two adapters each, padded to rank 4
    _, adapters = with_adapters(tiny, options, {})
    add_adapters(transformer, [adapter.factors for adapter in adapters])
    stacks = [module for module in transformer.modules() if isinstance(module, AdapterStack)]
    assert 2 * found == sum(stack.down.nbytes + stack.up.nbytes for stack in stacks)
    fused = [option._replace(scale=1.0) for option in options]
    assert need(PlannedEngine(tiny, lora=fused)).adapters == 0


def test_a_full_size_model_takes_what_the_budget_counts() -> None:
    """bench.budget counts at most 8.15 GB held by tensors, of graphs at 1024x1024 (tests/bench/budget)."""
    plan = planned_memory([PlannedEngine(open_checkpoint("random:sprint-0.6b"))], device="cpu", precision="bf16")
    assert 7.5e9 < plan.total < 8.5e9


def test_built_engines_count_by_the_files_that_a_start_reads(tmp_path: Path) -> None:
    sizes = {"text-0": 100, "transformer-0": 20, "decoder-0": 3, "fast_decoder-0": 5}
    files = tuple(FileRecord(name, size, "") for name, size in sizes.items())
    reference = {"64x64": FileRecord("reference", 1000, "")}
    both = replace(MANIFEST, shared=files, references=reference, fast_decoder="taesana")
    both.write(tmp_path)
    tiny = open_checkpoint("tiny")
    alone, with_fast = (need(PlannedEngine(tiny, str(tmp_path), fast)) for fast in (None, "taesana"))
    assert (alone.modules, alone.fast_decoder) == (23, 0)
    assert (with_fast.modules, with_fast.fast_decoder) == (28, 0)
    one = replace(both, shared=files[:-1], fast_decoder=None)
    one.write(tmp_path)
    beside = need(PlannedEngine(tiny, str(tmp_path), "taesana"))
    assert (beside.modules, beside.fast_decoder) == (23, need(PlannedEngine(tiny, None, "taesana")).fast_decoder)
    branch = bytes_of(load_controlnet(tiny, None, torch.float32, CPU))
    transformer = bytes_of(tiny.load_transformer(torch.float32, CPU))
    assert alone.controlnet == branch + transformer  # PyTorch's, beside the built one
    replace(both, vendor="native").write(tmp_path)
    assert need(PlannedEngine(tiny, str(tmp_path))).controlnet == branch


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    folder = changed_copy(TINY, tmp_path / "damaged")
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"transformer/.*\.safetensors: damaged or cut short"):
        planned_memory([PlannedEngine(open_checkpoint(str(folder)))], device="cpu", precision=None)
