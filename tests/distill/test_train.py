"""The recipe's stages at a small size: they resume, and the server and diffusers load their checkpoint."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from distill.objectives import losses
from distill.objectives.discriminator import Discriminator
from distill.recipes import RECIPES, Recipe, smoke, sprint_0_6b
from distill.stages import autoencoder, decoder_finetuning, student, teacher
from distill.stages.published_teacher import open_published_teacher, read_captioned_images, with_guidance
from distill.train import Run
from distill.training.latents import encode_scenes, layout_of
from distill.training.muon import Muon, orthogonalise
from distill.training.stage import Ema, Stage, learning_rate_factor
from distill.training.text_encoder import SmallCaptioner
from distill.world.captions import parse_caption
from distill.world.scenes import World, scene_for
from engines.checkpoints.checkpoint import open_checkpoint
from engines.models.transformer import SprintTransformer


def untrained() -> teacher.Teacher:
    model, captioner = teacher.build(smoke())
    return teacher.Teacher(teacher.without_layout(model.transformer, 32), captioner)


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole smoke run by the README's command."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "distill.train", "--recipe", "smoke", "--out", str(folder), "--threads", "1"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"TQDM_DISABLE": "1"}, timeout=600)
    return folder


def test_smoke_run_goes_through_all_stages_and_logs_them(finished: Path) -> None:
    for stage in ("autoencoder", "decoder", "teacher", "narrow", "student", "sharpen"):
        state = torch.load(finished / f"{stage}.pt", weights_only=True)
        assert state["step"] > 0
    scored = [json.loads(line) for line in (finished / "student.jsonl").read_text().splitlines()]
    assert {"score_1", "score_2"} <= scored[-1].keys()
    assert list(finished.glob("teacher_*.png"))


def test_smoke_checkpoint_loads_in_diffusers_and_in_our_engine(finished: Path) -> None:
    from diffusers import SanaSprintPipeline

    from engines.loader import load_engine
    from engines.types import Job

    folder = finished / "checkpoint"
    assert load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.bias"].shape == (32,)
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.guidance_embeds
    engine = load_engine(str(folder))
    try:
        assert engine.limits.default_size == (128, 128)
        (image,) = engine.generate([Job("a red circle", 1, 128, 128)])
    finally:
        engine.close()
    assert image.pixels.shape == (128, 128, 3)


def test_a_finished_run_trains_nothing_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.pt")}
    run = Run(smoke(), finished, Accelerator())
    assert run.sharpened is not None
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*.pt")} == before


def test_the_narrow_phase_begins_where_the_wide_one_ended(finished: Path) -> None:
    wide, narrow = (torch.load(finished / f"{name}.pt", weights_only=True) for name in ("teacher", "narrow"))
    name = "transformer.patch_embed.proj.weight"
    before, after = wide["average"][name], narrow["model"][name]
    fresh = teacher.build(smoke())[0].state_dict()[name]
    assert 0 < (after - before).norm() < 0.5 * (fresh - before).norm()


def test_a_wide_world_of_other_words_is_refused(tmp_path: Path) -> None:
    recipe = replace(smoke(), wide_world=World(shapes=("circle",)))
    with pytest.raises(ValueError, match="need the same words"):
        _ = Run(recipe, tmp_path, Accelerator()).wide_latents


def test_a_wide_world_without_steps_in_the_narrow_one_is_refused() -> None:
    whole = smoke()
    assert whole.teacher is not None
    with pytest.raises(ValueError, match="wide_world needs narrow_steps"):
        replace(whole, teacher=replace(whole.teacher, narrow_steps=0))


def test_sharpening_moves_the_decoder_and_nothing_else(finished: Path) -> None:
    shipped = load_file(finished / "checkpoint" / "vae" / "diffusion_pytorch_model.safetensors")
    before = Run(smoke(), finished, Accelerator()).decoder.state_dict()
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value.bfloat16(), shipped[name])}
    assert moved == {"decoder"}


def test_a_perfect_student_predicts_the_latents_themselves() -> None:
    flow_teacher, clean = untrained(), torch.randn(2, 32, 4, 4)

    class Perfect(torch.nn.Module):
        config = flow_teacher.transformer.config

        def forward(self, x: torch.Tensor, _text: object, time: torch.Tensor, *_: object) -> torch.Tensor:
            return (x - clean) / time[:, None, None, None]

    perfect = cast(SprintTransformer, Perfect())
    predicted = decoder_finetuning.predicted(clean, ["a red circle"] * 2, flow_teacher, perfect, 4.5, (0.1, 0.6))
    assert torch.allclose(predicted, clean, atol=1e-5)


def test_a_stopped_stage_goes_on_where_it_stood(tmp_path: Path) -> None:
    whole = smoke()
    assert whole.autoencoder is not None
    short = replace(whole, autoencoder=replace(whole.autoencoder, steps=2))
    longer = replace(whole, autoencoder=replace(whole.autoencoder, steps=3))
    autoencoder.train(short, tmp_path, Accelerator())
    autoencoder.train(longer, tmp_path, Accelerator())
    assert torch.load(tmp_path / "autoencoder.pt", weights_only=True)["step"] == 3


def test_a_kill_while_saving_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    stage = Stage(tmp_path, "part", 5, {"module": module})
    stage.save()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.save()
    monkeypatch.undo()
    assert not Stage(tmp_path, "part", 5, {"module": module}).resume()


def test_student_starts_as_an_exact_copy_of_the_teacher() -> None:
    distillation = student.Distillation(smoke().distil, untrained(), 32 * 16)
    for parameter in distillation.frozen.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    teacher.zero_guidance(distillation.frozen)
    distillation.student.transformer.load_state_dict(distillation.frozen.state_dict())
    sample = distillation.make_batch(torch.randn(2, 32, 4, 4), ["a red circle", "a blue square"])
    x, t = torch.randn(2, 32, 4, 4), torch.tensor([0.4, 1.3])
    with torch.no_grad():
        mine = distillation.student_prediction(sample)(x, t)
        theirs = distillation.teacher_prediction(replace(sample, guidance=torch.ones(2)))(x, t)
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_angle_weighs_alike_from_the_start() -> None:
    """The logvar head starts at its converged value, because one step depends on angles near pi/2."""
    angle = torch.linspace(0.3, 1.4, 12)
    with torch.no_grad():
        logvar = student.Student(untrained().transformer, 512).weighting(
            angle.sin() / (angle.sin() + angle.cos()), torch.full_like(angle, 0.45)
        )
    assert (logvar - losses.converged_logvar(512, angle)).abs().max() < 0.5


def test_guidance_embedding_can_learn() -> None:
    distillation = student.Distillation(smoke().distil, untrained(), 32 * 16)
    torch.nn.init.normal_(distillation.student.transformer.proj_out.weight)
    sample = distillation.make_batch(torch.randn(2, 32, 4, 4), ["a red circle", "a blue square"])
    distillation.student_prediction(sample)(
        torch.randn(2, 32, 4, 4), torch.tensor([0.4, 1.3])
    ).square().sum().backward()
    gradients = {n: p.grad for n, p in distillation.student.transformer.named_parameters() if "guidance_embedder" in n}
    assert gradients["time_embed.guidance_embedder.linear_2.weight"].abs().max() > 0  # type: ignore[union-attr]


def test_discriminator_trains_its_heads_only_and_refuses_unknown_blocks() -> None:
    transformer = untrained().transformer.requires_grad_(False)
    discriminator = Discriminator(transformer, (0, 1))
    names = {name.split(".")[0] for name, _ in discriminator.named_parameters()}
    assert names == {"heads"}
    with pytest.raises(ValueError, match=r"got \[5\], the teacher has blocks 0 to 1"):
        Discriminator(transformer, (5,))


def test_layout_says_which_colour_and_shape_covers_a_cell() -> None:
    world = World()
    scene = scene_for(world, np.random.default_rng(0), parse_caption("a red circle"), "single_object")
    layout = layout_of(world, scene, 8)
    names = [name for name, _ in world.colours] + list(world.shapes)
    thing = scene.things[0]
    column, row = int(thing.x * 8), int(thing.y * 8)
    covered = {name for name, share in zip(names, layout[:, row, column], strict=True) if share > 200}
    assert covered == {"red", "circle"}
    assert layout[:, 0, 0].max() == 0


def test_latents_stream_depends_on_seed_and_place_alone(tmp_path: Path) -> None:
    model = autoencoder.build(smoke())
    latents = encode_scenes(World(), model, 64, 8, 3, tmp_path / "latents.pt")
    again = encode_scenes(World(), model, 64, 8, 3, tmp_path / "latents.pt")
    stream, later = latents.batches(4, 1, 0), again.batches(4, 1, 2)
    next(stream), next(stream)
    expected, resumed = next(stream), next(later)
    assert expected.captions == resumed.captions
    assert torch.equal(expected.latents, resumed.latents)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_moves_matrices_and_pointwise_convolutions_downhill() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 6)), torch.nn.Parameter(torch.randn(4, 8, 1, 1))]
    optimizer = Muon(weights, lr=0.05)
    before = sum(w.square().sum() for w in weights)
    for _ in range(30):
        optimizer.zero_grad()
        sum(w.square().sum() for w in weights).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert sum(w.square().sum() for w in weights) < 0.8 * before


def test_average_gives_the_weights_back() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = Ema(module, 0.5)
    torch.nn.init.constant_(module.weight, 3.0)
    with average.applied_to(module):
        assert module.weight.item() != 3.0
    assert module.weight.item() == 3.0


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, warmup=10, decay_fraction=0.5) for step in (0, 9, 40, 75, 99)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_say_what_they_miss(name: str) -> None:
    recipe: Recipe = RECIPES[name]()
    assert recipe.name == name
    if recipe.autoencoder is None:
        with pytest.raises(ValueError, match="trains no autoencoder"):
            autoencoder.build(recipe)


def test_paper_recipe_has_the_released_values() -> None:
    config = sprint_0_6b().distil
    assert (config.learning_rate, config.gradient_clip, config.tangent_warmup) == (2e-6, 0.1, 4000)
    assert (config.student_mean, config.student_std) == (0.2, 1.6)
    assert (config.discriminator_mean, config.discriminator_std) == (-0.6, 1.0)
    assert (config.scm_weight, config.adversarial_weight, config.max_time_probability) == (1.0, 0.5, 0.5)
    assert config.guidance == (4.0, 4.5, 5.0)


def test_tokenizer_reads_past_case_and_punctuation() -> None:
    captioner = untrained().caption
    assert isinstance(captioner, SmallCaptioner)
    plain = captioner.tokens(["a red circle on a white background"])
    assert torch.equal(captioner.tokens(["A red circle, on a WHITE background."]).ids, plain.ids)
    assert 3 not in plain.ids


def test_a_published_teacher_gets_a_guidance_embedding_that_adds_nothing() -> None:
    transformer = untrained().transformer
    torch.nn.init.normal_(transformer.proj_out.weight)
    base = SprintTransformer(replace(transformer.config, guidance_embeds=False))
    weights = {k: v for k, v in transformer.state_dict().items() if "guidance_embedder" not in k}
    base.load_state_dict({k.replace("time_embed.timestep", "time_embed.emb.timestep"): v for k, v in weights.items()})
    x, text, t = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 64), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(with_guidance(base)(x, text, t, 0.45 * torch.ones(2)), base(x, text, t))


def test_images_without_captions_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds none of"):
        read_captioned_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png has no caption; write it into one\.txt"):
        read_captioned_images(tmp_path)
    (tmp_path / "one.txt").write_text("a white square\n")
    assert [caption for _, caption in read_captioned_images(tmp_path)] == ["a white square"]


def test_a_finished_checkpoint_is_distilled_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoder and student are new, the mean of two; text encoder, tokenizer and image encoder are the checkpoint's."""
    monkeypatch.setattr("distill.train.RECOVERY_STEPS", 2)
    whole, source = smoke(), finished / "checkpoint"
    assert whole.autoencoder is not None
    assert whole.teacher is not None
    recipe = replace(
        whole,
        students=2,
        autoencoder=replace(whole.autoencoder, sharpen_steps=2),
        teacher=replace(whole.teacher, narrow_latents=16, batch=4),
        distil=replace(whole.distil, steps=2, score_every=100, bfloat16=False),
    )
    made = Run(recipe, tmp_path, Accelerator(), again=source).checkpoint
    for name in ("model_index.json", "sprint.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes(), name
    before, after = (
        {
            f"{part}.{key}": value
            for part in ("transformer", "vae")
            for key, value in load_file(folder / part / "diffusion_pytorch_model.safetensors").items()
        }
        for folder in (source, made)
    )
    assert before.keys() == after.keys()
    changed = {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}
    assert "vae.decoder" in changed
    assert "vae.encoder" not in changed
    assert "transformer.transformer_blocks" in changed
    assert open_checkpoint(str(made)).settings == open_checkpoint(str(source)).settings
    states = [torch.load(tmp_path / f"student_{index}" / "student.pt", weights_only=True) for index in (0, 1)]
    name = "transformer.patch_embed.proj.weight"
    one, other = (state["average"][name] for state in states)
    assert not torch.equal(one, other)
    assert torch.equal(((one + other) / 2).bfloat16(), after[name])


@pytest.mark.slow
def test_a_published_teacher_and_a_folder_of_images_are_distilled(finished: Path, tmp_path: Path) -> None:
    """As users with GPUs would, with the smoke checkpoint as the teacher."""
    shots = tmp_path / "images"
    shots.mkdir()
    for index in range(4):
        Image.new("RGB", (200, 150), (40 * index, 90, 200)).save(shots / f"{index}.png")
        (shots / f"{index}.txt").write_text(f"image {index}")
    recipe = replace(smoke(), autoencoder=None, teacher=None)
    published = open_published_teacher(str(finished / "checkpoint"), torch.device("cpu"), torch.float32)
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(recipe, folder, Accelerator(), published, shots)
    assert (run.checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (run.checkpoint / "text_encoder" / "config.json").is_file()
