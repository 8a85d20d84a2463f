"""The kernels of a released variant, built from its sizes alone: no weights are needed.

So also the largest variants, whose weights take gigabytes, can be scheduled, compiled and looked
at kernel by kernel. Kernels of stock operators (pooling, transposes) are not among them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tvm import tirx
from tvm.target import Target

from dcnv3_tvm.bench.cases import stage_specs
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.gemm import gemm, implicit_gemm
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.mlp import mlp, pays
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules import weight_tile_width
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import is_gpu
from dcnv3_tvm.transform.lower_gpu import MANY_SUMS

_BIAS = Epilogue(bias=True)
_GELU = Epilogue(bias=True, activation="gelu")
_RESIDUAL = Epilogue(bias=True, residual=True)


class VariantKernel(NamedTuple):
    """A kernel, and the rule that is meant for it."""

    name: str
    rule: str
    function: tirx.PrimFunc


def variant_kernels(
    variant: str,
    target: Target,
    dtype: str = "float32",
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
) -> list[VariantKernel]:
    """Build every kernel of a variant's stem, stages and downsamplings once.

    Parameters
    ----------
    variant : str
        A name of `dcnv3_tvm.frontend.list_models`.
    target : tvm.target.Target
        A CPU or a GPU: their kernels differ.
    dtype : str
        Element type of the products.
    batch : int
        Images.
    size : (int, int), optional
        Height and width of the image; by default the variant's own.
    """
    config = model_config(variant)
    if is_gpu(target) and dtype == "bfloat16":
        dtype = "float16"  # all of a block is bounded, see `transform.half_products`
    specs = stage_specs(variant, batch=batch, size=size)
    found: dict[str, VariantKernel] = {}
    for stage, spec in enumerate(specs):
        for kernel in (
            *_stem(spec, target, dtype, first=stage == 0),
            *_block(config, spec, config.depths[stage], target, dtype),
        ):
            found.setdefault(kernel.name, kernel)
    return list(found.values())


def _places(spec: DCNv3Spec) -> tuple[int, int, int]:
    return spec.batch or 1, spec.height or 1, spec.width or 1


def _block(
    config: InternImageConfig, spec: DCNv3Spec, depth: int, target: Target, dtype: str
) -> Iterator[VariantKernel]:
    places, channels = _places(spec), spec.channels
    center_feature = config.center_feature_scale
    packed = tensorir.packed_channels(spec, center_feature=center_feature)
    hidden = int(channels * config.mlp_ratio)
    normed = not (config.post_norm or config.res_post_norm)
    stream = "float32" if normed and 2 * depth > MANY_SUMS else dtype
    yield _matmul(places, channels, channels, _BIAS, target, dtype)
    yield _matmul(places, channels, channels, _RESIDUAL, target, dtype, stream)
    yield _matmul(places, channels, packed, _BIAS, target, dtype)
    one_kernel = is_gpu(target) and dtype != "float32"
    if one_kernel and pays(math.prod(places), channels, hidden, channels):
        yield VariantKernel(
            f"mlp_{channels}_{hidden}_{channels}_residual",
            "mlp",
            mlp(places, channels, hidden, channels, activation="gelu", residual=True, dtype=dtype),
        )
    else:
        yield _matmul(places, channels, hidden, _GELU, target, dtype)
        yield _matmul(places, hidden, channels, _RESIDUAL, target, dtype, stream)
    window = config.dw_kernel_size
    x_dtype = dtype if is_gpu(target) else None
    yield VariantKernel(
        f"depthwise_{channels}",
        "depthwise",
        depthwise_kernel(
            *places,
            channels,
            kernel_size=(window, window),
            pad=(window // 2, window // 2),
            bias=True,
            norm_eps=1e-6,
            activation="gelu",
            x_dtype=x_dtype,
            out_dtype=dtype,
        ),
    )
    x_stream = stream if is_gpu(target) else None
    yield VariantKernel(
        f"layer_norm_{channels}",
        "layer_norm",
        layer_norm_kernel(places, channels, eps=1e-6, x_dtype=x_stream, out_dtype=dtype),
    )
    sampled = dataclasses.replace(spec, softmax=True, dtype=x_dtype or spec.dtype)
    yield VariantKernel(
        f"dcnv3_{channels}",
        "dcnv3",
        tensorir.dcnv3_packed(sampled, dtype, center_feature=center_feature),
    )


def _stem(spec: DCNv3Spec, target: Target, dtype: str, *, first: bool) -> Iterator[VariantKernel]:
    """Build the convolutions that lead to a stage: two for the first, one without bias else."""
    batch, height, width = _places(spec)
    channels = spec.channels
    if first:
        yield _convolution((batch, 4 * height, 4 * width), 3, channels // 2, _BIAS, target, dtype)
    epilogue = _BIAS if first else Epilogue()
    places = batch, 2 * height, 2 * width
    yield _convolution(places, channels // 2, channels, epilogue, target, dtype)


def _matmul(
    places: tuple[int, int, int],
    inputs: int,
    outputs: int,
    epilogue: Epilogue,
    target: Target,
    dtype: str,
    stream: str | None = None,
) -> VariantKernel:
    words = [epilogue.activation, "residual" if epilogue.residual else None]
    name = "_".join(["matmul", str(inputs), str(outputs), *(word for word in words if word)])
    if is_gpu(target):
        function = gemm(
            places,
            inputs,
            outputs,
            epilogue=epilogue,
            dtype=dtype,
            residual_dtype=stream,
            out_dtype=stream,
        )
        return VariantKernel(name, "gemm", function)
    tile = weight_tile_width(outputs, target)
    function = matmul(places, inputs, outputs, tile=tile, epilogue=epilogue, dtype=dtype)
    return VariantKernel(name, "matmul", function)


def _convolution(
    places: tuple[int, int, int],
    inputs: int,
    outputs: int,
    epilogue: Epilogue,
    target: Target,
    dtype: str,
) -> VariantKernel:
    name, sizes = f"convolution_{inputs}_{outputs}", (*places, inputs, outputs)
    options: Any = {"kernel_size": (3, 3), "stride": (2, 2), "pad": (1, 1), "epilogue": epilogue}
    if is_gpu(target):
        x_dtype = "float32" if inputs == 3 else None
        function = implicit_gemm(*sizes, **options, dtype=dtype, x_dtype=x_dtype)
        return VariantKernel(name, "gemm", function)
    function = convolution(*sizes, **options, tile=weight_tile_width(outputs, target))
    return VariantKernel(name, "convolution", function)
