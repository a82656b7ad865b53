"""The section Ablation: verdicts follow the intervals, and the rest of the page stays."""

from pathlib import Path

import pytest

from distill.evaluation.ablation_section import BOTH, PARTS, UNTRAINED, AblationError, section, summary, write_section

CATEGORIES = ["a", "b"] * 20
SETTINGS = {"model": "models/tiny", "updates": 9, "batch": 4, "prompts": 40}


def verdicts(right: int) -> dict[str, list[int]]:
    return {steps: [1] * right + [0] * (40 - right) for steps in ("1", "2")}


def test_a_gain_without_zero_beats_and_one_with_zero_shows_nothing() -> None:
    mixed = {"1": [0, 1] * 20, "2": [1, 0] * 20}
    done = {
        UNTRAINED: {0: verdicts(10)},
        BOTH: {seed: verdicts(20) for seed in range(3)},
        PARTS[0]: dict.fromkeys(range(3), mixed),
        PARTS[1]: {seed: verdicts(4) for seed in range(2)},
    }
    result = SETTINGS | summary(done, CATEGORIES)
    assert result["rows"][BOTH]["seeds"] == 3
    assert result["apart"][PARTS[1]]["seeds"] == 2, "seeds that both rows have"
    assert result["apart"][PARTS[1]]["by_seed"]["1"] == [0.4, 0.4]
    text = section(result, "python -m distill.ablation")
    assert "In 1 step, both together are not shown to differ from sCM alone and beat LADD alone." in text
    assert "| sCM + LADD | 3 | 0.500 | 0." in text
    assert "| LADD alone | 2 | +0.400 | +0." in text
    assert "recovered from `models/tiny`" in text


def test_a_loss_is_called_one() -> None:
    done = {BOTH: {0: verdicts(4)}, PARTS[0]: {0: verdicts(30)}, PARTS[1]: {}}
    assert "lose to sCM alone." in section(SETTINGS | summary(done, CATEGORIES), "command")


def test_only_the_section_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Page\n\n## Ablation\n\nold\n\n## Next\n\nkept\n")
    write_section(page, "new\n")
    assert page.read_text() == "# Page\n\n## Ablation\n\nnew\n\n## Next\n\nkept\n"
    write_section(page, "newer\n")
    assert page.read_text() == "# Page\n\n## Ablation\n\nnewer\n\n## Next\n\nkept\n"
    page.write_text("# Page\n")
    with pytest.raises(AblationError, match="Ablation"):
        write_section(page, "new\n")
    assert page.read_text() == "# Page\n"
