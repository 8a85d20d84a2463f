"""Add an entry that returns the offsets and the mask of every DCNv3 of the model.

It is a copy of the entry ``main`` with other results, made once projections are merged, so that
both read the same weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
from tvm import relax

from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.op import relax_op, relax_packed_op
from dcnv3_tvm.op.expr import extent_text
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.signature import MAIN, OFFSETS, Entry, ExposedBlock, TensorInfo, function_of
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.transform.ir import Program, dimensions, element_type


def expose_offsets(program: Program) -> Program:
    """Add the entry ``offsets`` to a program, for each image size.

    Raises
    ------
    CompileError
        If the model has no DCNv3, or an entry of that name.
    """
    if OFFSETS in program.entries:
        raise CompileError(
            "the model has an entry of the name of the exposed one",
            got=OFFSETS,
            hint="Rename that entry of the imported model.",
        )
    functions = dict(program.module.functions_items())
    entries = dict(program.entries)
    for name in program.entries:
        if function_of(name) == MAIN:
            exposed = OFFSETS + name.removeprefix(MAIN)
            function, entries[exposed] = _exposed(program, name)
            functions[exposed] = function.with_attr("global_symbol", exposed)
    # Rebuilding drops what only the results of `main` need.
    return Program(tvm.IRModule(functions), entries, program.weights).rebuilt(lambda *_: None)


def _exposed(program: Program, name: str) -> tuple[relax.Function, Entry]:
    """Return a copy of an entry that returns the offsets."""
    main = program.entries[name]
    function = relax.utils.copy_with_new_vars(program.module[name])
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    added = _Bindings()
    results: list[relax.Expr] = []
    blocks = []
    for call in (binding.value for binding in bindings):
        if relax_op.is_dcnv3(call):
            offset, mask = call.args[1:]
            results += added.offset_and_weights(offset, mask, params_of(call))
        elif relax_packed_op.is_dcnv3_packed(call):
            results += added.unpacked(call.args[1], params_of(call))
        else:
            continue
        blocks.append(_described(call))
    if not results:
        raise CompileError(
            "the model has no DCNv3 whose offsets could be exposed", hint="Compile without expose."
        )
    output = relax.Var("output", added.type_of(relax.Tuple(results)))
    last = relax.VarBinding(output, relax.Tuple(results))
    exposed = relax.Function(
        function.params,
        relax.SeqExpr([relax.DataflowBlock([*bindings, *added.bindings, last])], output),
        ret_ty=output.ty,
        attrs=function.attrs,
    )
    outputs = tuple(
        TensorInfo(
            f"{('offset', 'mask')[index % 2]}_{index // 2}",
            tuple(map(extent_text, dimensions(result))),
            element_type(result),
            "NHWC",
        )
        for index, result in enumerate(results)
    )
    return exposed, Entry(main.inputs, outputs, main.weights, tuple(blocks))


def _described(call: relax.Call) -> ExposedBlock:
    # The mask that is returned holds weights, after the softmax.
    params = dataclasses.replace(params_of(call), softmax=False)
    return ExposedBlock(params, tuple(map(extent_text, dimensions(call.args[0])[1:3])))


class _Bindings:
    """Bindings to append to a function."""

    def __init__(self) -> None:
        self.bindings: list[relax.VarBinding] = []
        self._builder = relax.BlockBuilder()

    def unpacked(self, packed: relax.Expr, params: DCNv3Params) -> list[relax.Expr]:
        """Return offset and mask of a tensor that holds offsets, logits and padding."""
        split = params.offset_channels
        end = split + params.mask_channels
        offset, logits = (
            self._emit(relax.op.strided_slice(packed, [3], [first], [last]))
            for first, last in ((0, split), (split, end))
        )
        return self.offset_and_weights(offset, logits, params)

    def offset_and_weights(
        self, offset: relax.Expr, mask: relax.Expr, params: DCNv3Params
    ) -> list[relax.Expr]:
        """Return offset and mask, with the softmax that the operator applies to the mask."""
        if params.softmax:
            shape = mask.ty.shape
            grouped = [*list(shape.values)[:3], params.group, params.points]
            logits = self._emit(relax.op.reshape(mask, grouped))
            weights = self._emit(relax.op.nn.softmax(logits, axis=-1))
            mask = self._emit(relax.op.reshape(weights, shape))
        return [offset, mask]

    def type_of(self, expr: relax.Expr) -> Any:
        """Return the type of an expression."""
        return self._builder.normalize(expr).ty

    def _emit(self, expr: relax.Expr) -> relax.Var:
        value = self._builder.normalize(expr)
        var = relax.DataflowVar("exposed", value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var
