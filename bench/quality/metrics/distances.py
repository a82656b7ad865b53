"""Distances between two sets of features: Fréchet (FID) and maximum mean discrepancy (CMMD)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.harness.errors import BenchError

Features = NDArray[np.float64]  # [N, D]

MMD_SIGMA = 10.0  # google-research/cmmd, distance.py
MMD_SCALE = 1000.0
ROWS = 2048  # of a kernel matrix at a time


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, as pytorch-fid stores them in .npz files."""

    mean: Features
    covariance: Features

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Computes the moments. Raises BenchError for fewer than two images, which have no covariance."""
        if len(features) < 2:
            raise BenchError(f"fid: got {len(features)} image(s), needed are two at least")
        return cls(features.mean(0), np.cov(features, rowvar=False))

    @classmethod
    def read(cls, path: Path) -> "Moments":
        """Reads pytorch-fid's .npz with `mu` and `sigma`. Raises BenchError."""
        try:
            with np.load(path) as arrays:
                return cls(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
        except (OSError, KeyError, ValueError) as error:
            raise BenchError(
                f"{path}: needed is an .npz with mu and sigma, as pytorch-fid writes it ({error})"
            ) from error

    def write(self, path: Path) -> None:
        np.savez_compressed(path, mu=self.mean, sigma=self.covariance)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), FID as defined by Heusel et al. 2017.

    The trace of the root is the sum of the square roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric. Unlike
    scipy's sqrtm of C1 C2, this works with fewer images than dimensions, where the product is singular.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    distance = np.square(a.mean - b.mean).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(distance + traces - 2 * np.sqrt(np.maximum(shared, 0)).sum())


def mean_discrepancy(a: Features, b: Features) -> float:
    """Returns CMMD of unit-length embeddings: 1000 times the squared MMD, biased, Gaussian kernel of sigma 10.

    Source: Jayasumana et al. 2024; google-research/cmmd, distance.py.
    """
    return MMD_SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b))


def _mean_kernel(a: Features, b: Features) -> float:
    squares = np.square(b).sum(1)
    total = 0.0
    for first in range(0, len(a), ROWS):
        rows = a[first : first + ROWS]
        distance = np.square(rows).sum(1)[:, None] + squares - 2 * rows @ b.T
        total += float(np.exp(-distance / (2 * MMD_SIGMA**2)).sum())
    return total / (len(a) * len(b))
