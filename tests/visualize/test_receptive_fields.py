"""The field of deformable paths, compared with derivatives of the operator."""

import dataclasses

import numpy as np
import pytest

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import dcnv3_loops
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec
from dcnv3_tvm.visualize import receptive_field
from dcnv3_tvm.visualize.block_sampling import SampledBlock, number_blocks

PARAMS = DCNv3Params(group=2)


@pytest.fixture
def sampled(rng):
    def block(height: int, width: int) -> SampledBlock:
        shape = (1, height, width)
        offset = 2 * rng.standard_normal((*shape, PARAMS.offset_channels))
        mask = rng.random((*shape, PARAMS.mask_channels))
        return SampledBlock(PARAMS, (height, width), offset, mask)

    return [block(9, 7), block(9, 7), block(5, 4)]


def operator(block: SampledBlock, x: np.ndarray) -> np.ndarray:
    """Apply a block to one channel, as all groups see it, and return the mean of the groups."""
    both = np.repeat(x[None, :, :, None], 2, axis=-1)
    spec = DCNv3Spec.of(both.shape, **PARAMS.keywords())
    return dcnv3_loops(both, block.offset, block.mask, spec)[0].mean(-1)


def test_field_is_the_derivative_of_the_composed_operators(sampled, rng):
    blocks = number_blocks(sampled, (36, 28))
    fields = receptive_field(blocks, 2, 3, 1)
    assert [field.contribution.shape for field in fields] == [(5, 4), (9, 7), (9, 7)]
    assert [field.block for field in fields] == [blocks[2], blocks[1], blocks[0]]
    x = rng.standard_normal((9, 7))
    y = operator(sampled[2], operator(sampled[1], operator(sampled[0], x))[::2, ::2])
    # Points are stored in float32.
    np.testing.assert_allclose((fields[2].contribution * x).sum(), y[3, 1], rtol=1e-4)


def test_field_through_an_upsampling(rng):
    def block(height: int, width: int) -> SampledBlock:
        shape = (1, height, width)
        offset = rng.standard_normal((*shape, PARAMS.offset_channels))
        return SampledBlock(PARAMS, (height, width), offset, rng.random((*shape, 18)))

    small, large = block(3, 4), block(6, 8)
    fields = receptive_field(number_blocks([small, large], (12, 16)), 1, 4, 5)
    x = rng.standard_normal((3, 4))
    upsampled = operator(small, x).repeat(2, axis=0).repeat(2, axis=1)
    expected = operator(large, upsampled)[4, 5]
    np.testing.assert_allclose((fields[1].contribution * x).sum(), expected, rtol=1e-4)


def test_one_group(sampled, rng):
    blocks = number_blocks(sampled, (36, 28))
    both = [receptive_field(blocks, 0, 4, 3, group=group)[0].contribution for group in (0, 1)]
    x = rng.standard_normal((9, 7))
    np.testing.assert_allclose((sum(both) * x).sum() / 2, operator(sampled[0], x)[4, 3], rtol=1e-4)
    assert not np.allclose(*both)


def test_points_that_are_not_numbers_contribute_nothing(sampled):
    (block,) = number_blocks(sampled[:1], (36, 28))
    points = block.points.copy()
    points[2, 2, 0, 4] = np.nan
    broken = dataclasses.replace(block, points=points)
    (field,) = receptive_field([broken], 0, 2, 2)
    (whole,) = receptive_field([block], 0, 2, 2)
    lost = whole.contribution.sum() - field.contribution.sum()
    assert 0 <= lost <= block.weights[2, 2, 0, 4] / 2 + 1e-6


def test_what_does_not_exist(sampled):
    blocks = number_blocks(sampled, (36, 28))
    for index, y, x, group in ((3, 0, 0, 0), (0, 9, 0, 0), (0, 0, -1, 0), (0, 0, 0, 2)):
        with pytest.raises(InvalidArgumentError):
            receptive_field(blocks, index, y, x, group=group)
