"""Aspect ratios by name: upstream's buckets, and what an engine makes of them."""

import math

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN

from engines.types import Limits
from server.generation.aspect_ratios import BUCKETS_1024, sizes_by_ratio


def limits(side: int, sizes: tuple[tuple[int, int], ...] = ()) -> Limits:
    return Limits(8, (side, side), sizes=sizes, max_side=2 * side, max_pixels=4 * side * side)


@pytest.mark.parametrize(
    ("side", "table"), [(512, ASPECT_RATIO_512_BIN), (1024, ASPECT_RATIO_1024_BIN), (2048, ASPECT_RATIO_2048_BIN)]
)
def test_sizes_are_upstreams_buckets(side: int, table: dict[str, list[float]]) -> None:
    """Each name's bucket is upstream's, and no bucket of upstream is nearer to the name by more than a hundredth."""
    sizes = sizes_by_ratio(limits(side))
    assert list(sizes) == list(BUCKETS_1024)
    buckets = {(int(width), int(height)) for height, width in table.values()}
    for name, (width, height) in sizes.items():
        assert (width, height) in buckets
        across, _, down = name.partition(":")
        shape = int(across) / int(down)
        nearest = min(abs(math.log(w / h / shape)) for w, h in buckets)
        assert abs(math.log(width / height / shape)) < nearest + 0.01, name


def test_engine_of_fixed_sizes_offers_what_it_was_built_for() -> None:
    assert sizes_by_ratio(limits(1024, ((1024, 1024), (1344, 768)))) == {"1:1": (1024, 1024), "16:9": (1344, 768)}
    landscape = Limits(8, (1344, 768), sizes=((1344, 768),))
    assert sizes_by_ratio(landscape) == {"16:9": (1344, 768)}


def test_other_default_sizes_keep_shape_and_area() -> None:
    engine = limits(256)
    sizes = sizes_by_ratio(engine)
    assert list(sizes) == list(BUCKETS_1024)
    for name, (width, height) in sizes.items():
        across, _, down = name.partition(":")
        assert engine.allows_size(width, height)
        assert width / height == pytest.approx(int(across) / int(down), rel=0.11)
        assert width * height == pytest.approx(256 * 256, rel=0.25)
    assert sizes_by_ratio(limits(256, ((256, 256), (320, 192)))) == {"1:1": (256, 256), "16:9": (320, 192)}
