"""The reference replaces a kernel that is wrong on a card, and the next start reads this from the file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.backends.cuda.proof import compare
from engines.kernels.op import Launcher, Op, Ops

RIGHT = Op("right", lambda _, x: x + 1, lambda x: x + 1)
WRONG = Op("wrong", lambda _, x: x + 2, lambda x: x + 1)


def refuse(_: Launcher, x: Tensor) -> Tensor:
    raise RuntimeError(f"no such instruction for {list(x.shape)}")


IMPOSSIBLE = Op("impossible", refuse, lambda x: x * 2)
X = torch.arange(4.0)


def test_what_differs_or_cannot_run_is_replaced_by_its_reference(tmp_path: Path) -> None:
    ops, proof, ran = Ops(Launcher(False, 1)), tmp_path / "deep" / "proof.json", []

    def work() -> None:
        ran.append([ops(op, X) for op in (RIGHT, WRONG, IMPOSSIBLE)])

    replaced = compare(ops, work, proof)
    assert set(replaced) == {"wrong", "impossible"}
    assert "dB to its reference" in replaced["wrong"]
    assert replaced["impossible"] == "RuntimeError: no such instruction for [4]"
    assert [value.tolist() for value in ran[0]] == [(X + 1).tolist(), (X + 1).tolist(), (X * 2).tolist()]
    again = Ops(Launcher(False, 1))
    assert compare(again, work, proof) == replaced
    assert len(ran) == 1
    assert again(WRONG, X).tolist() == (X + 1).tolist()


def test_without_a_file_everything_is_compared() -> None:
    ops = Ops(Launcher(False, 1))
    assert set(compare(ops, lambda: ops(WRONG, X), None)) == {"wrong"}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ops = Ops(Launcher(False, 1))
    assert set(compare(ops, lambda: ops(WRONG, X), tmp_path / "file" / "proof.json")) == {"wrong"}


def test_a_missing_compiler_is_told_and_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def find_none(_: Launcher, x: Tensor) -> Tensor:  # noqa: ARG001  # the signature of Op.run
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    ops, proof = Ops(Launcher(False, 1)), tmp_path / "proof.json"
    assert set(compare(ops, lambda: ops(Op("lost", find_none, lambda x: x), X), proof)) == {"lost"}
    assert "--vendor native, which needs none" in caplog.text
    assert not proof.exists()


@pytest.mark.parametrize("lacking", ["reference", "kernel"])
def test_lack_of_memory_for_a_comparison_replaces_nothing(lacking: str, tmp_path: Path) -> None:
    """A reference in fp32 takes several times a kernel's memory, so it would be no help."""
    room = {"reference": 0, "kernel": 1}[lacking]

    def full(*given: Tensor) -> Tensor:
        nonlocal room
        room -= 1
        if room < 0:
            room = 9
            raise torch.OutOfMemoryError("no room beside the other's result")
        return given[-1] + 1

    ops, proof = Ops(Launcher(False, 1)), tmp_path / "proof.json"
    found = list[Tensor]()
    compare(ops, lambda: found.append(ops(Op("large", full, full), X)), proof)
    assert ops.replaced == {}
    assert found[0].tolist() == (X + 1).tolist()


def test_one_comparison_stands_for_all_values_of_a_float() -> None:
    compared = []

    def reference(x: Tensor, scale: float | None) -> Tensor:
        compared.append(scale)
        return x if scale is None else x * scale

    scaled = Op("scaled", lambda _, x, scale: x if scale is None else x * scale, reference)
    ops = Ops(Launcher(False, 1))
    compare(ops, lambda: [ops(scaled, X, scale) for scale in (0.5, 0.25, None, 0.75)], None)
    assert compared == [0.5, None]
