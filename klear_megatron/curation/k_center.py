"""Selects a subset such that every other point is close to it."""

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16  # rows at a time, so that no second copy of all the vectors is made


def k_center_greedy(vectors: NDArray[np.float32], k: int, seed: int) -> NDArray[np.int64]:
    """The row numbers of k centers, in the order they were chosen (Sener & Savarese 2018).

    The first is random; each further one is the row whose Euclidean distance to its nearest center
    is greatest; ties go to the first row.

    Args:
        vectors: [rows, dimensions] float32; rows >= k.
    """
    rows = len(vectors)
    norms = np.concatenate(
        [np.square(vectors[i : i + _CHUNK]).sum(1) for i in range(0, rows, _CHUNK)]
    )
    center = int(np.random.default_rng(seed).integers(rows))
    centers = [center]
    nearest = np.full(rows, np.inf, np.float32)  # squared
    for _ in range(k - 1):
        distances = norms - 2 * (vectors @ vectors[center]) + norms[center]
        np.minimum(nearest, distances, out=nearest)
        nearest[center] = -np.inf  # so that rounding errors cannot choose it again
        center = int(nearest.argmax())
        centers.append(center)
    return np.array(centers)
