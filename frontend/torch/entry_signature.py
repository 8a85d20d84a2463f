"""Describe the outputs of an imported function: names, shapes, layouts, strides."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax, tirx

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.op.expr import extent_text
from dcnv3_tvm.signature import TensorInfo


def describe_outputs(
    names: Sequence[str],
    function: relax.Function,
    examples: Sequence[Sequence[int]],
    image: tuple[int, int] | None,
) -> tuple[TensorInfo, ...]:
    """Describe the outputs.

    Parameters
    ----------
    names : sequence of str
        Paths of the tensors in the result.
    function : relax.Function
        Its first parameters are the inputs.
    examples : sequence of shapes
        Possible shapes of the first parameters.
    image : (int, int) or None
        Height and width of the image for these, which tell feature maps from other tensors.

    Raises
    ------
    ModelImportError
        If the shape of an output is unknown.
    """
    outputs = function.ret_ty.fields
    shapes = []
    for name, output in zip(names, outputs, strict=True):
        shape = _example_shape(output, function, examples)
        if shape is None:
            raise ModelImportError(
                "the shape of an output is unknown",
                got=f"output {name or 0!r}",
                hint="The model combines a tensor of a fixed size (linspace, a slice up to a "
                "constant) with one of a dynamic size: import it with fixed sizes.",
            )
        shapes.append(shape)
    all_maps = _are_maps(shapes, image)
    return tuple(
        TensorInfo(
            name,
            _symbolic_shape(output),
            str(output.dtype.dtype),
            *_layout_and_stride(shape, image, all_maps),
        )
        for name, output, shape in zip(
            name_outputs(names, shapes, image), outputs, shapes, strict=True
        )
    )


def name_outputs(
    paths: Sequence[str], shapes: Sequence[Sequence[int]], image: tuple[int, int] | None
) -> list[str]:
    """Name outputs by their paths and shapes; parameters as in `describe_outputs`."""
    all_maps = _are_maps(shapes, image)
    return [
        _output_name(path, len(shape), all_maps) for path, shape in zip(paths, shapes, strict=True)
    ]


def _are_maps(shapes: Sequence[Sequence[int]], image: tuple[int, int] | None) -> bool:
    return all(len(shape) == 4 and _stride(shape[2:], image) for shape in shapes)


def is_pyramid(outputs: Sequence[TensorInfo]) -> bool:
    """Whether all outputs are feature maps (N, C, H', W')."""
    return all(output.layout == "NCHW" and output.stride for output in outputs)


def _symbolic_shape(tensor: relax.TensorType) -> tuple[int | str, ...]:
    return tuple(map(extent_text, tensor.shape.values))


def _example_shape(
    output: relax.TensorType, function: relax.Function, examples: Sequence[Sequence[int]]
) -> list[int] | None:
    """Return the shape of an output for shapes of the inputs; None if it is not known from them."""
    if output.shape is None:
        return None
    analyzer = tvm.sym.Analyzer()
    for parameter, example in zip(function.params, examples, strict=False):
        for size, value in zip(parameter.ty.shape.values, example, strict=True):
            if isinstance(size, tirx.Var):
                analyzer.bind(size, tirx.IntImm("int64", value))
    sizes = [analyzer.simplify(size) for size in output.shape.values]
    known = all(isinstance(size, tirx.IntImm) for size in sizes)
    return [int(size.value) for size in sizes] if known else None


def _output_name(path: str, rank: int, all_maps: bool) -> str:
    if all_maps and (not path or path.isdecimal()):
        return f"feature_{path or 0}"
    if not path:
        return "logits" if rank == 2 else "output"
    return f"output_{path}" if path.isdecimal() else path


def _layout_and_stride(
    shape: list[int], image: tuple[int, int] | None, all_maps: bool
) -> tuple[str, int | None]:
    if len(shape) != 4:
        return "", None
    strides = {"NCHW": _stride(shape[2:], image), "NHWC": _stride(shape[1:3], image)}
    possible = [(layout, stride) for layout, stride in strides.items() if stride]
    # Where both layouts fit, the outputs of a pyramid are NCHW.
    return possible[0] if len(possible) == 1 or (all_maps and possible) else ("", None)


def _stride(size: Sequence[int], image: tuple[int, int] | None) -> int | None:
    """Return the power of two by which a (height, width) is smaller than the image's."""
    if image is None:
        return None
    height, width = image
    stride = 1
    while [height, width] != list(size):
        if height == width == 1:
            return None
        height, width = (height + 1) // 2, (width + 1) // 2
        stride *= 2
    return stride
