"""``dcnv3-tvm export``: write a model as an ONNX file."""

from __future__ import annotations

import argparse
from typing import Final

from dcnv3_tvm.cli.arguments import add_shape, image_shape, parse_path
from dcnv3_tvm.cli.model_arguments import add_model, create_described, find_model
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx import FORMS
from dcnv3_tvm.progress import Progress

HELP: Final = "export a model to ONNX"
EXAMPLE: Final = (
    "dcnv3-tvm export internimage_t_1k_224.pth -o internimage_t.onnx --form deform-conv"
)

_STEPS: Final = {"build PyTorch model": 4, "export": 18, "compare": 18}
"""Seconds that the steps take for InternImage-T, roughly."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=parse_path, required=True, metavar="FILE", help="file to write"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="how DCNv3 is written: deform-conv for ONNX Runtime and TensorRT 10.1, grid-sample "
        "for OpenVINO, plugin for the published TensorRT plugin, or custom with a function "
        "(default: %(default)s)",
    )
    add_shape(parser)
    parser.add_argument("--dynamic-batch", action="store_true", help="accept any batch size")
    parser.add_argument(
        "--opset", type=int, default=20, help="version of ONNX's operators (default: %(default)s)"
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Export the model and compare it with PyTorch."""
    name, checkpoint = find_model(arguments)
    if arguments.output.exists() and not arguments.force:
        raise InvalidArgumentError(
            "the file exists", got=arguments.output, hint="Use --force to replace it."
        )
    from dcnv3_tvm.frontend.models.variants import model_config
    from dcnv3_tvm.frontend.onnx.compare import error_in_onnxruntime
    from dcnv3_tvm.frontend.onnx.export import export_onnx

    shape = image_shape(arguments, model_config(name).resolution)
    with Progress(f"export {name}", steps=_STEPS, quiet=arguments.quiet) as progress:
        progress.step("build PyTorch model")
        model = create_described(name, checkpoint, arguments)
        progress.step("export")
        export_onnx(
            model,
            arguments.output,
            example=shape,
            form=arguments.form,
            dynamic_batch=arguments.dynamic_batch,
            opset=arguments.opset,
        )
        progress.step("compare")
        error = (
            None
            if arguments.form == "plugin"
            else error_in_onnxruntime(arguments.output, model, shape)
        )
    data = {"file": str(arguments.output), "form": arguments.form, "max_error": error}
    compared = (
        "not compared with PyTorch: "
        + ("the plugin runs in TensorRT" if arguments.form == "plugin" else "no onnxruntime here")
        if error is None
        else f"max error in ONNX Runtime {error:.1e} of max |reference|"
    )
    return Result(data, f"{arguments.output}: {name} as {arguments.form}; {compared}")
