"""Run a model on an image, and keep where its DCNv3 sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import CompiledModel
from dcnv3_tvm.signature import MAIN, OFFSETS
from dcnv3_tvm.size_expressions import evaluate_size
from dcnv3_tvm.visualize.block_sampling import BlockSampling, SampledBlock, number_blocks

if TYPE_CHECKING:
    from torch import nn


def capture_sampling(model: CompiledModel | nn.Module, image: Any) -> tuple[BlockSampling, ...]:
    """Run a model on an image, and return where each of its DCNv3 samples.

    Parameters
    ----------
    model : CompiledModel or torch.nn.Module
        A model compiled with ``expose="offsets"``, or a PyTorch model: this library's InternImage,
        a published one, or any other module that `dcnv3_tvm.frontend.import_model` takes. It is not
        changed, and run in inference mode.
    image : array of NumPy or PyTorch
        One preprocessed image, of shape (1, 3, H, W), or (1, H, W, 3) for models that take that.

    Returns
    -------
    tuple of BlockSampling
        In the order in which they run.

    Raises
    ------
    InvalidArgumentError
        If the image is not one image of floats, the artifact does not expose its offsets, or the
        model has no DCNv3.
    ModelImportError
        If a PyTorch model cannot be imported.

    Examples
    --------
    >>> import torch
    >>> from dcnv3_tvm import frontend, visualize
    >>> model = frontend.create_model("test_internimage_pre_norm")
    >>> blocks = visualize.capture_sampling(model, torch.rand(1, 3, 32, 32))
    >>> [(each.stage, each.block, each.points.shape) for each in blocks[:2]]
    [(0, 0, (8, 8, 2, 9, 2)), (1, 0, (4, 4, 4, 9, 2))]
    """
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    shape = pixels.shape
    if len(shape) != 4 or shape[0] != 1 or 3 not in (shape[1], shape[3]):
        raise InvalidArgumentError(
            "the image is not one preprocessed image",
            got=f"shape {shape}",
            allowed="an array of shape (1, 3, H, W), such as model.preprocess(...) returns",
        )
    size = (shape[2], shape[3]) if shape[1] == 3 else (shape[1], shape[2])
    if isinstance(model, CompiledModel):
        return number_blocks(_from_artifact(model, pixels, size), size)
    if pixels.dtype.kind != "f":
        raise InvalidArgumentError(
            "the image is not preprocessed", got=pixels.dtype, allowed="an array of floats"
        )
    from dcnv3_tvm.visualize.capture_module import from_module

    return number_blocks(from_module(model, np.ascontiguousarray(pixels, np.float32)), size)


def _from_artifact(
    model: CompiledModel, image: npt.NDArray[Any], size: tuple[int, int]
) -> list[SampledBlock]:
    info = model.metadata.entry_for(MAIN, size).inputs[0]
    batch = info.shape[0]
    # In a batch of fixed size, all images are this one.
    outputs = model.offsets(image.repeat(batch, axis=0) if isinstance(batch, int) else image)
    blocks = model.metadata.entry_for(OFFSETS, size).blocks
    values = info.dynamic_sizes(image.shape)
    return [
        SampledBlock(
            block.params,
            (evaluate_size(block.size[0], values), evaluate_size(block.size[1], values)),
            offset,
            mask,
        )
        for block, (offset, mask) in zip(blocks, outputs, strict=True)
    ]
