"""The reader returns weights as they were written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.artifacts.manifest import FileRecord
from engines.artifacts.native import reading
from engines.artifacts.native.reading import read_weights


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_are_read_as_they_were_written(place: str, tmp_path: Path) -> None:
    """The weights are larger than a chunk."""
    written = {
        "large": torch.randint(0, 255, (80_000_001,), dtype=torch.uint8),
        "small": torch.randn(3).to(torch.bfloat16),
        "none": torch.empty(0),
        "scaled": torch.randn(5_000_000).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "weights.safetensors"
    save_file(written, path)
    found = read_weights([(path, FileRecord.of(path).sha256)], torch.device(place))
    assert found.keys() == written.keys()
    for name, tensor in found.items():
        assert tensor.device.type == place
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), written[name].view(torch.uint8))


def test_all_files_go_through_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has 32 and then begins again: an engine that is captured beside a serving one would share its stream."""
    made, used = list[object](), list[object]()

    def stream(device: torch.device) -> str:
        made.append(device)
        return f"stream {len(made)}"

    def read(path: Path, *rest: object) -> dict[str, Tensor]:
        used.append(rest[-1])
        return {path.name: torch.empty(0)}

    there = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(reading, "_read", read)
    assert len(read_weights([(Path(str(number)), "") for number in range(40)], there)) == 40
    assert made == [there]
    assert used == ["stream 1"] * 40
