"""The ControlNet stage at a small size: sketches, training, the saved branch, and its scores."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from distill.evaluation.control_adherence import Score, cases, overlap, score
from distill.recipes import ControlStageConfig, smoke
from distill.stages import teacher
from distill.stages.autoencoder import build as build_autoencoder
from distill.stages.controlnet import ControlTraining, control_world, encode, scene_of, train
from distill.training.checkpoint_writer import write_checkpoint
from distill.world.rendering import World, coverage, render
from distill.world.scenes import Scene, Thing
from distill.world.sketches import RAYS, draw_sketch, outline
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine
from engines.types import Job

ROOT = Path(__file__).resolve().parents[3]


def control_config() -> ControlStageConfig:
    config = smoke().control
    assert config is not None
    return config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe's checkpoint, untrained but for a random last layer."""
    folder = tmp_path_factory.mktemp("untrained")
    model, captioner = teacher.build(smoke())
    student = teacher.without_layout(model.transformer, 32)
    torch.nn.init.normal_(student.proj_out.weight, std=0.1)
    sprint = {"instruction": False, "max_prompt_tokens": 24, "default_size": [128, 128], "guidance_trained": [4, 5]}
    write_checkpoint(folder, student, build_autoencoder(smoke()), captioner.encoder, captioner.tokenizer, sprint)
    return folder


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run by the README's command."""
    out = tmp_path_factory.mktemp("control")
    command = [sys.executable, "-m", "distill.stages.controlnet", "--model", str(checkpoint), "--recipe", "smoke"]
    command += ["--out", str(out), "--threads", "1"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"TQDM_DISABLE": "1"}, timeout=300)
    return out


@pytest.mark.parametrize("shape", World().shapes)
def test_an_outline_is_where_the_shape_ends(shape: str) -> None:
    points = outline(shape)
    assert points.shape == (RAYS, 2)
    for scale, covered in ((0.97, 1.0), (1.03, 0.0)):
        places = (points * scale * 400).astype(np.float32)
        inside = [coverage(shape, x.reshape(1), y.reshape(1), 400.0, 0.0).item() for x, y in places]
        assert set(inside) == {covered}


def test_a_drawing_is_white_on_black_along_the_outline() -> None:
    world = World()
    for number in range(20):
        rng = np.random.default_rng(number)
        scene = scene_of(control_world(world), 0, number)
        drawn = draw_sketch(scene, 128, rng)
        assert (drawn.shape, drawn.dtype) == ((128, 128, 3), np.uint8)
        assert drawn.max() == 255
        assert (drawn > 0).mean() < 0.35
        lines = drawn[..., 0] > 127
        edge = np.zeros((128, 128), bool)
        for thing in scene.things:
            x = (np.arange(128, dtype=np.float32) + np.float32(0.5 - thing.x * 128))[None, :]
            y = (np.arange(128, dtype=np.float32) + np.float32(0.5 - thing.y * 128))[:, None]
            outer = coverage(thing.shape, x, y, thing.size * 128 * 1.2 + 10, thing.angle) > 0
            inner = coverage(thing.shape, x, y, max(thing.size * 128 * 0.8 - 10, 1.0), thing.angle) > 0
            edge |= outer & ~inner
        assert (lines & ~edge).sum() <= 0.06 * lines.sum()


def test_drawings_differ_and_a_seed_repeats_one() -> None:
    scene = scene_of(World(), 0, 0)
    first, again, other = (draw_sketch(scene, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_training_leaves_the_student_alone_and_teaches_the_branch(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    training = ControlTraining(control_config(), opened, torch.device("cpu"))
    autoencoder = opened.load_autoencoder(torch.float32, torch.device("cpu"))
    drawings = encode(autoencoder, control_world(World()), 128, 8, 7, tmp_path / "drawings.pt")
    batch = training.batch(drawings, 0)
    assert batch.clean.shape == batch.control.shape == (4, 32, 4, 4)
    training.loss(batch).backward()
    assert all(parameter.grad is None for parameter in training.student.parameters())
    learning = {name for name, p in training.branch.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "controlnet_blocks.0.weight" in learning


def test_an_empty_drawing_is_held_to_the_student_alone(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    training = ControlTraining(replace(control_config(), empty_probability=1.0), opened, torch.device("cpu"))
    autoencoder = opened.load_autoencoder(torch.float32, torch.device("cpu"))
    drawings = encode(autoencoder, control_world(World()), 128, 8, 7, tmp_path / "drawings.pt")
    batch = training.batch(drawings, 0)
    assert batch.empty == len(batch.clean)
    assert training.loss(batch).item() == 0  # the branch begins by adding nothing
    torch.nn.init.normal_(training.branch.controlnet_blocks[0].weight)
    assert training.loss(batch).item() > 0


def test_the_smoke_run_ships_what_the_engine_loads(finished: Path, checkpoint: Path) -> None:
    folder = finished / "controlnet"
    config = json.loads((folder / "config.json").read_text())
    assert (config["_class_name"], config["num_layers"], config["injection"]) == ("SanaControlNetModel", 1, "nvlabs")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["controlnet_blocks.0.weight"].abs().max() > 0
    engine = load_engine(str(checkpoint), controlnet=str(folder))
    try:
        drawing = cases(1, 128)[0].drawing
        images = [
            engine.generate([Job("a red circle", 1, 128, 128, control_image=image)])[0] for image in (drawing, None)
        ]
        assert (images[0].pixels != images[1].pixels).any()
        assert isinstance(score(engine, cases(2, 128), 1, 1.0), Score)
    finally:
        engine.close()
    assert list(finished.glob("control_*.png"))


def test_a_stopped_stage_goes_on(finished: Path, checkpoint: Path) -> None:
    before = torch.load(finished / "control.pt", weights_only=True)
    assert before["step"] == control_config().steps
    opened = open_checkpoint(str(checkpoint))
    train(replace(control_config(), steps=before["step"] + 1), World(), opened, finished, Accelerator())
    assert torch.load(finished / "control.pt", weights_only=True)["step"] == before["step"] + 1


def test_the_tiny_controlnet_is_small() -> None:
    from distill.recipes import tiny
    from engines.models.controlnet import ControlConfig, ControlNet

    recipe = tiny()
    assert recipe.control is not None
    assert recipe.teacher is not None
    copies = replace(recipe.teacher.architecture, num_layers=recipe.control.copies)
    with torch.device("meta"):
        branch = ControlNet(ControlConfig(copies, recipe.control.injection))
    assert 2 * sum(parameter.numel() for parameter in branch.parameters()) < 3_000_000


def test_overlap_says_whether_the_thing_is_there() -> None:
    world = World()
    thing = Thing("circle", "red", 0.3, 0.4, 0.4)
    requirement = cases(1, 64)[0].scene.requirement
    scene = Scene((thing,), "white", "single_object", requirement)
    assert overlap(render(world, scene, 128), scene) > 0.97
    for changed in (replace(thing, x=0.6), replace(thing, colour="blue"), replace(thing, size=0.2)):
        assert overlap(render(world, replace(scene, things=(changed,)), 128), scene) < 0.5


def test_cases_are_held_out_and_stay_the_same() -> None:
    chosen = cases(50, 64)
    assert [case.caption for case in chosen] == [case.caption for case in cases(50, 64)]
    assert all(case.scene.requirement.size or case.scene.requirement.background for case in chosen)
    xs = [case.scene.things[0].x for case in chosen]
    assert max(xs) - min(xs) > 0.4
