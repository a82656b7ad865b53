"""Images as zero-bordered NHWC matrices [B*(H+2)*(W+2), C], in which a 3x3 convolution is nine shifted products.

Zero borders separate all images and lines, so each neighbour of a pixel is a row at a fixed distance.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Grid(NamedTuple):
    """Number and size in pixels of images, without their borders."""

    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def padded(self) -> int:
        """Rows of the zero-bordered matrix."""
        return self.batch * (self.height + 2) * (self.width + 2)

    @property
    def doubled(self) -> "Grid":
        return Grid(self.batch, 2 * self.height, 2 * self.width)


def pad(image: Tensor) -> Tensor:
    """Converts [B, C, H, W] to a zero-bordered matrix."""
    return F.pad(image, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, image.shape[1]).contiguous()


def image_of(matrix: Tensor, grid: Grid) -> Tensor:
    """Views a zero-bordered matrix as [B, C, H, W]."""
    bordered = matrix.view(grid.batch, grid.height + 2, grid.width + 2, matrix.shape[1])
    return bordered[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
