"""Build and run small Relax programs, for tests of the transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from dcnv3_tvm.signature import Entry, TensorInfo
from dcnv3_tvm.transform.ir import Program
from dcnv3_tvm.transform.lazy_array import LazyArray
from helpers.relax_vm import compile_relax

Array = npt.NDArray[np.float32]


def make_program(
    build: Callable[..., relax.Expr],
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, Array],
) -> Program:
    """Build a program with the single function ``main``.

    Parameters
    ----------
    build : callable
        Function of a BlockBuilder, the inputs and the weights (Relax variables, in order) that
        returns the result.
    inputs : mapping of str to shape
        Shapes of float32 inputs; a string is a symbolic size.
    weights : mapping of str to ndarray
        Weights by name.
    """
    symbols: dict[str, tvm.tirx.Var] = {}

    def size(value: int | str) -> int | tvm.tirx.Var:
        if isinstance(value, int):
            return value
        return symbols.setdefault(value, tvm.tirx.Var(value, "int64"))

    input_vars = [
        relax.Var(name, relax.TensorType([size(value) for value in shape], "float32"))
        for name, shape in inputs.items()
    ]
    weight_vars = [
        relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
        for name, array in weights.items()
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", [*input_vars, *weight_vars]):
        with builder.dataflow():
            result = build(builder, *input_vars, *weight_vars)
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    entry = Entry(
        inputs=tuple(TensorInfo(name, tuple(shape), "float32") for name, shape in inputs.items()),
        outputs=(),
        weights=tuple(weights),
    )
    arrays = {name: LazyArray.of(array) for name, array in weights.items()}
    return Program(builder.get(), {"main": entry}, arrays)


def run_program(program: Program, *inputs: Array) -> Array:
    """Run ``main`` of a program with TVM's default pipeline and return its only output."""
    module = relax.transform.LegalizeOps()(program.module)
    machine = compile_relax(module)
    weights = [np.asarray(program.weights[name]) for name in program.entries["main"].weights]
    arguments = [*inputs, *weights]
    result = machine["main"](*(tvm.runtime.tensor(array) for array in arguments))
    array: Array = result.numpy()
    return array


def operators(program: Program) -> list[str]:
    """List the operators and kernels that ``main`` of a program calls, in order."""
    names = []
    for block in program.module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call):
                kernel = call.op.name == "relax.call_tir"
                names.append(call.args[0].name_hint if kernel else call.op.name)
    return names


def kernel_types(program: Program) -> dict[str, list[str]]:
    """Return the element types of the parameters of each kernel, by its name."""
    return {
        var.name_hint: [str(param.dtype) for param in function.params]
        for var, function in program.module.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
