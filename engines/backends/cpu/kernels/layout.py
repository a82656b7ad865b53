"""Images as kernels see them: [B, C, H, W] with a pixel's channels side by side in memory (channels-last)."""

from torch import Tensor

Edges = tuple[int, int]  # rows of zeros above and below the input


def pixel_rows(x: Tensor) -> Tensor:
    """Views [B, C, H, W] as [B*H*W, C], one row per pixel."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
