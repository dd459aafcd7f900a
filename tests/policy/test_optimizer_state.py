"""Flat ranges of a tensor as hyper-rectangles of it."""

import math

import pytest
import torch

from klear_megatron.policy.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (5, 1), (3, 4, 5), (2, 3, 2, 2)])
def test_boxes_have_every_element_of_the_range_once_and_in_order(shape):
    tensor = torch.arange(math.prod(shape)).view(shape)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            cut = list(boxes(start, stop, shape))
            pieces = [
                tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                for offsets, sizes in cut
            ]
            assert [int(x) for piece in pieces for x in piece.flatten()] == [*range(start, stop)]
            assert len(cut) <= 2 * len(shape) - 1
