"""Blocks of a model with four stages."""

import numpy as np
import pytest

from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.visualize import BlockSampling
from dcnv3_tvm.visualize.block_sampling import SampledBlock, number_blocks

IMAGE = (48, 64)


@pytest.fixture(scope="module")
def blocks() -> tuple[BlockSampling, ...]:
    """Two blocks at stride 4, and one each at strides 8 and 16, with random offsets."""
    rng = np.random.default_rng(20260801)

    def block(stride: int, group: int) -> SampledBlock:
        params = DCNv3Params(group=group, softmax=True)
        shape = (1, IMAGE[0] // stride, IMAGE[1] // stride)
        offset = rng.standard_normal((*shape, params.offset_channels)).astype(np.float32)
        mask = rng.standard_normal((*shape, params.mask_channels)).astype(np.float32)
        return SampledBlock(params, shape[1:], offset, mask)

    return number_blocks([block(4, 2), block(4, 2), block(8, 4), block(16, 8)], IMAGE)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rows, columns = np.mgrid[: IMAGE[0], : IMAGE[1]]
    return np.stack([3 * rows, 2 * columns, rows + columns], axis=-1).astype(np.uint8)
