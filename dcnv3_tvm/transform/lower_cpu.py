"""Lower layers to kernels for CPUs, with their weights packed in column tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm import relax

from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.packing import (
    pack_convolution_weight,
    pack_matmul_weight,
    pack_tile_weight,
)
from dcnv3_tvm.kernels.tile_convolution import pack_tile_convolution_weight, tile_convolution
from dcnv3_tvm.kernels.tile_matmul import supports_tiles, tile_matmul
from dcnv3_tvm.op.relax_packed_op import is_dcnv3_packed
from dcnv3_tvm.transform.find_layers import Layer, absorbed_values, find_layers
from dcnv3_tvm.transform.ir import Program, Rebuilder, element_type
from dcnv3_tvm.transform.lower_common import (
    LayerContext,
    call_depthwise,
    depthwise_kernel,
    lower_layer_norm,
    lower_sampling,
)
from dcnv3_tvm.transform.storage_cpu import find_bfloat16


class CpuTiling(NamedTuple):
    """Choices of the CPU schedules that the kernels they get depend on.

    Parameters
    ----------
    weight_tile_width : callable
        Width of the column tiles to pack a weight in, for a number of output features.
    row_slack : callable
        Extra rows to compute, for a number of rows.
    matrix_tiles : bool
        Whether bfloat16 matmuls use the processor's matrix tiles.
    """

    weight_tile_width: Callable[[int], int]
    row_slack: Callable[[Any], int]
    matrix_tiles: bool = False


def lower_cpu(program: Program, tiling: CpuTiling, dtype: str = "float32") -> Program:
    """Lower every layer that has a kernel; the rest is left to TVM's legalisation.

    Parameters
    ----------
    program : Program
        Channels last, with weights folded.
    tiling : CpuTiling
        From the schedules for the target.
    dtype : str
        Element type of matmul operands: float32, or bfloat16 for the matmuls that support it, and
        for the convolutions if these use matrix tiles.
    """
    layers: dict[relax.Var, Layer] = {}
    absorbed: set[relax.Var] = set()
    bfloat16_matmuls: set[relax.Var] = set()
    bfloat16_stored: set[relax.Var] = set()
    for name, entry in program.entries.items():
        function = program.module[name]
        found = find_layers(function, len(entry.inputs))
        layers |= found
        absorbed |= absorbed_values(function, found)
        if dtype == "bfloat16":
            values = find_bfloat16(function, found, matrix_tiles=tiling.matrix_tiles)
            bfloat16_matmuls |= values.matmuls
            bfloat16_stored |= values.stored
    converted: dict[tuple[Rebuilder, relax.Expr], relax.Var] = {}

    def as_bfloat16(rebuilder: Rebuilder, source: relax.Expr) -> relax.Expr:
        """Convert a tensor to bfloat16, once for all its readers."""
        if element_type(source) == "bfloat16":
            return source
        if (rebuilder, source) not in converted:
            converted[rebuilder, source] = rebuilder.emit(relax.op.astype(source, "bfloat16"))
        return converted[rebuilder, source]

    def visit(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
        if var in absorbed:
            return relax.Var(var.name, var.ty)  # placeholder: nothing reads it in the end
        layer = layers.get(var)
        if layer is None and not is_dcnv3_packed(call):
            return None
        out_dtype = "bfloat16" if var in bfloat16_stored else element_type(var)
        if layer is None:
            return lower_sampling(rebuilder, var, call, out_dtype, vector_loads=False)
        source = rebuilder.current(layer.root.args[0])
        if var in bfloat16_matmuls:
            source = as_bfloat16(rebuilder, source)
        context = LayerContext(rebuilder, var, layer, source, out_dtype)
        if layer.kind == "matmul":
            return _lower_matmul(context, tiling)
        if layer.kind == "convolution":
            tiles = dtype == "bfloat16" and tiling.matrix_tiles
            return _lower_convolution(context, tiling, tiles=tiles)
        if layer.kind == "depthwise":
            return call_depthwise(context, depthwise_kernel(context, row_slack=tiling.row_slack))
        return lower_layer_norm(context, tiling.row_slack)

    return program.rebuilt(visit)


def _lower_matmul(context: LayerContext, tiling: CpuTiling) -> relax.Var:
    layer, matrix = context.layer, context.matrix
    outputs, inputs = matrix.shape
    arguments = [context.source, None, layer.bias, layer.residual]
    weight = matrix.astype(context.dtype)
    if tiling.matrix_tiles and context.dtype == "bfloat16":
        kernel = tile_matmul(
            context.sizes[:-1],
            inputs,
            outputs,
            epilogue=context.epilogue,
            out_dtype=context.out_dtype,
        )
        arguments[1] = context.packed(pack_tile_weight, weight, kernel.params[1])
        return context.call(kernel, f"tile_matmul_{inputs}_{outputs}", arguments)
    tile = tiling.weight_tile_width(outputs)
    kernel = matmul(
        context.sizes[:-1],
        inputs,
        outputs,
        tile=tile,
        row_slack=tiling.row_slack(context.rows),
        epilogue=context.epilogue,
        dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    arguments[1] = context.packed(pack_matmul_weight, weight, kernel.params[1], tile=tile)
    return context.call(kernel, f"matmul_{inputs}_{outputs}", arguments)


def _lower_tile_convolution(context: LayerContext) -> relax.Var:
    weight = context.weight
    outputs, *kernel_size, inputs = weight.shape
    kernel = tile_convolution(
        *context.sizes,
        outputs,
        kernel_size=tuple(kernel_size),
        **context.window,
        epilogue=context.epilogue,
    )
    packed = context.packed(
        pack_tile_convolution_weight, weight.astype("bfloat16"), kernel.params[1]
    )
    arguments = [context.source, packed, context.layer.bias]
    return context.call(kernel, f"tile_convolution_{inputs}_{outputs}", arguments)


def _lower_convolution(context: LayerContext, tiling: CpuTiling, *, tiles: bool) -> relax.Var:
    weight = context.weight
    outputs, height, width, inputs = weight.shape
    if tiles and supports_tiles(width * inputs, outputs):
        return _lower_tile_convolution(context)
    tile = tiling.weight_tile_width(outputs)
    kernel = convolution(
        *context.sizes,
        outputs,
        kernel_size=(height, width),
        **context.window,
        tile=tile,
        row_slack=tiling.row_slack(context.output_width((height, width))),
        epilogue=context.epilogue,
    )
    weight = weight.transpose(0, 3, 1, 2)
    packed = context.packed(pack_convolution_weight, weight, kernel.params[1], tile=tile)
    arguments = [context.source, packed, context.layer.bias]
    return context.call(kernel, f"convolution_{inputs}_{outputs}", arguments)
