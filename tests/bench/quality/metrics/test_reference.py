"""FID and CLIP score against their reference implementations, on 200 images and seeded weights, to 1e-3.

References: pytorch-fid's own path, torch-fidelity's own network, and OpenAI's clip with NVlabs' loop. They are
installed in a separate environment (`make quality-proof`).
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.quality.metrics.clip import SMALL, Architecture, OpenClip
from bench.quality.metrics.image_items import ImageItem, center_crop
from bench.quality.metrics.inception import INCEPTION, Inception, _as_torch_hub
from bench.quality.metrics.measures import clip_score, cmmd, fid
from bench.quality.metrics.weights import WeightLocations
from distill.world.captions import caption_of
from distill.world.rendering import render, sample_scene
from distill.world.scenes import CATEGORIES, World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("QUALITY_PROOF" not in os.environ, reason="needs the references: make quality-proof"),
    pytest.mark.filterwarnings("ignore"),  # of packages that are not ours
]
CPU = torch.device("cpu")
COUNT, SIDE, CUT = 200, 320, 299


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[ImageItem]]:
    """Two folders of 200 scenes each, and the first with its captions."""
    root = tmp_path_factory.mktemp("sets")
    items = []
    for name, seed in (("ours", 1), ("reference", 2)):
        (root / name).mkdir()
        rng = np.random.default_rng(seed)
        for at in range(COUNT):
            scene = sample_scene(World(), rng, CATEGORIES[at % len(CATEGORIES)], "train")
            noise = rng.normal(0, 6 * seed, (SIDE, SIDE, 3))  # the sets differ in more than their scenes
            pixels = np.clip(render(World(), scene, SIDE) + noise, 0, 255).astype(np.uint8)
            path = root / name / f"{at:05}.png"
            Image.fromarray(pixels).save(path)
            if name == "ours":
                items.append(ImageItem(path, caption_of(scene.requirement, rng)))
    return root / "ours", root / "reference", items


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights in the file that pytorch-fid publishes."""
    from pytorch_fid import inception
    from torchvision.models import Inception3

    def draw(network: Any, _: object) -> None:
        generator = torch.Generator().manual_seed(11)
        for value in network.state_dict().values():
            if value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(Inception3, "load_state_dict", draw)
        network = inception.fid_inception_v3()
    path = tmp_path_factory.mktemp("weights") / INCEPTION.file
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def cut(sets: tuple[Path, Path, list[ImageItem]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both sets as NVlabs' script has them before they are tensors: cut by torchvision."""
    from torchvision import transforms

    made = transforms.Compose([transforms.Resize(CUT), transforms.CenterCrop(CUT)])
    folders = []
    for folder in sets[:2]:
        target = tmp_path_factory.mktemp("cut")
        for path in sorted(folder.glob("*.png")):
            image = made(Image.open(path))
            image.save(target / path.name)
            assert torch.equal(center_crop(CUT)(Image.open(path)), transforms.ToTensor()(image))
        folders.append(target)
    return folders[0], folders[1]


def test_features_are_torch_fidelity_s(cut: tuple[Path, Path], inception_weights: Path) -> None:
    """Equal inputs are used: torch-fidelity scales bytes by (x - 128) / 128, pytorch-fid and NVlabs by x / 127.5 - 1.
    With its own scaling its FID of these sets is 0.1157 where theirs is 0.1168."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("seeded", ["2048"], str(inception_weights))
    pixels = [np.array(Image.open(path)) for path in sorted(cut[0].glob("*.png"))[:16]]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    ours, theirs = Inception(inception_weights, CPU)(batch / 256), network(batch)[0]
    distance = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"features of 16 images beside torch-fidelity's: at most {distance:.2e} of the largest apart")
    assert theirs.std(0).median() > 0
    assert distance <= 1e-3


def test_fid_is_pytorch_fid_s(
    sets: tuple[Path, Path, list[ImageItem]], cut: tuple[Path, Path], inception_weights: Path
) -> None:
    from pytorch_fid.fid_score import calculate_fid_given_paths

    ours = fid(sets[2], sets[1], Inception(inception_weights, CPU), CUT)
    with _as_torch_hub(inception_weights):
        theirs = calculate_fid_given_paths([str(folder) for folder in cut], 50, "cpu", 2048, num_workers=0)
    print(f"FID of {COUNT} images: ours {ours:.6f}, pytorch-fid {theirs:.6f}")
    assert ours > 0.01
    assert abs(ours - theirs) <= 1e-3 * theirs


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights of ViT-B/32 in the hub's file, in numbers that fp16 holds, because OpenAI's code rounds to it."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(5)
    network = open_clip.create_model(SMALL.name)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_final.weight", "ln_pre.weight")):
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
            value.copy_(value.half().float())
    folder = tmp_path_factory.mktemp("clip")
    save_file(network.state_dict(), folder / SMALL.weights.file)
    return folder


def openai_clip(weights: Path) -> tuple[Any, Any]:
    """OpenAI's own network and preparation, with the seeded weights."""
    import clip
    from safetensors.torch import load_file

    state = load_file(weights / SMALL.weights.file)
    network = clip.model.build_model({name: value for name, value in state.items() if name != "attn_mask"})
    return network.float(), clip.clip._transform(network.visual.input_resolution)


def test_clip_score_is_that_of_openai_s_network_in_upstream_s_loop(
    sets: tuple[Path, Path, list[ImageItem]], clip_weights: Path
) -> None:
    import clip

    items = sets[2]
    found = WeightLocations(clip_weights).find("clip", SMALL.weights)
    ours = clip_score(items, OpenClip(Architecture(SMALL.name, SMALL.weights), found, CPU))
    network, prepare = openai_clip(clip_weights)
    total = 0.0
    with torch.no_grad():
        for first in range(0, COUNT, 50):
            some = items[first : first + 50]
            images = network.encode_image(torch.stack([prepare(Image.open(one.path)) for one in some]))
            texts = network.encode_text(clip.tokenize([one.prompt for one in some], context_length=77, truncate=True))
            images, texts = (value / value.norm(dim=1, keepdim=True) for value in (images, texts))
            total += float(network.logit_scale.exp() * (images * texts).sum())
    print(f"CLIP score of {COUNT} images: ours {ours.mean:.6f}, OpenAI's in upstream's loop {total / COUNT:.6f}")
    assert abs(ours.mean) > 0.01
    assert abs(ours.mean - total / COUNT) <= 1e-3


def test_cmmd_is_google_s_formula_on_openai_s_embeddings(
    sets: tuple[Path, Path, list[ImageItem]], clip_weights: Path
) -> None:
    found = WeightLocations(clip_weights).find("cmmd", SMALL.weights)
    ours = cmmd(sets[2], sets[1], OpenClip(SMALL, found, CPU))
    network, prepare = openai_clip(clip_weights)
    embedded = []
    with torch.no_grad():
        for folder in sets[:2]:
            paths = sorted(folder.glob("*.png"))
            batches = [
                torch.stack([prepare(Image.open(path)) for path in paths[at : at + 50]]) for at in range(0, COUNT, 50)
            ]
            features = torch.cat([network.encode_image(batch) for batch in batches]).double()
            embedded.append(features / features.norm(dim=1, keepdim=True))
    x, y = embedded
    xx, yy, xy = (torch.exp(-torch.cdist(a, b).square() / 200).mean() for a, b in ((x, x), (y, y), (x, y)))
    theirs = 1000 * float(xx + yy - 2 * xy)
    print(f"CMMD of {COUNT} images: ours {ours:.6f}, google's formula {theirs:.6f}")
    assert ours > 1e-4
    assert abs(ours - theirs) <= 1e-6
