"""The shipped weights reach the scores of their cards, on fewer prompts and drawings, in one step."""

from pathlib import Path

from distill.decoder import correct_share
from distill.evaluation.control_adherence import cases, score
from distill.evaluation.scores import engine_generator, evaluate, evaluation_prompts
from engines.loader import load_engine

MODELS = Path(__file__).resolve().parents[2] / "models"


def test_the_tiny_checkpoint_draws_held_out_prompts() -> None:
    engine = load_engine(str(MODELS / "tiny"))
    try:
        report = evaluate(engine_generator(engine, 1, 4.5), evaluation_prompts(36, seed=23))
    finally:
        engine.close()
    assert report.mean >= 0.85  # 0.958 of 1,500; three standard errors of 36 below


def test_the_tiny_controlnet_is_followed_and_without_it_chance_decides() -> None:
    engine = load_engine(str(MODELS / "tiny"))
    try:
        chosen = cases(24, engine.limits.default_size[0])
        drawn, without = score(engine, chosen, 1, 1.0), score(engine, chosen, 1, None)
    finally:
        engine.close()
    assert drawn.follows >= 0.8  # 0.97 of 200
    assert without.follows <= 0.45  # 0.13 of 200


def test_the_small_decoder_is_as_right_as_the_full_one() -> None:
    model = str(MODELS / "tiny")
    small, full = (correct_share(model, name, 200) for name in ("taesana", "full"))
    assert full - small <= 0.03  # 0.965 and 0.960


def test_all_weights_together_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in MODELS.rglob("*.safetensors")}
    assert sum(size for path, size in sizes.items() if "controlnet" in path.parts) < 3e6
    assert sum(size for path, size in sizes.items() if "taesana" in path.parts) < 1e6
    assert sum(sizes.values()) < 16e6
