"""The model between passes, rewriting of its Relax functions, and helpers for Relax expressions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst

from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.op.relax_call import add_kernel
from dcnv3_tvm.signature import Entry
from dcnv3_tvm.transform.lazy_array import LazyArray


@dataclasses.dataclass(frozen=True)
class Program:
    """A model during compilation.

    Parameters
    ----------
    module : tvm.IRModule
        One Relax function for each entry, and the kernels so far.
    entries : dict of str to Entry
        Signatures by function name. The parameters of a function are its inputs, then its weights,
        in the order of the entry.
    weights : dict of str to LazyArray
        By name; shared by the entries.
    """

    module: tvm.IRModule
    entries: dict[str, Entry]
    weights: dict[str, LazyArray]

    @classmethod
    def of(cls, imported: ImportedModel) -> Program:
        """Start with an imported model."""
        weights = {name: LazyArray.of(array) for name, array in imported.weights.items()}
        return cls(imported.module, dict(imported.entries), weights)

    def transformed(self, transform: tvm.transform.Pass) -> Program:
        """Apply a TVM pass that does not change the parameters of the entries."""
        return dataclasses.replace(self, module=transform(self.module))

    def with_plain_names(self) -> Program:
        """Rename derived weights to the weight they come from, if only one comes from it."""
        origins = Counter(name.partition(":")[0] for name in self.weights)
        plain = {
            name: origin if origins[origin := name.partition(":")[0]] == 1 else name
            for name in self.weights
        }
        return Program(
            self.module,
            {
                function: dataclasses.replace(
                    entry, weights=tuple(plain[name] for name in entry.weights)
                )
                for function, entry in self.entries.items()
            },
            {plain[name]: array for name, array in self.weights.items()},
        )

    def rebuilt(
        self, visit: Callable[[Rebuilder, relax.Var, relax.Call], relax.Var | None]
    ) -> Program:
        """Rewrite every entry.

        Parameters
        ----------
        visit : callable
            Called with ``(rebuilder, var, call)`` for each call in order, its arguments already
            rewritten. Returns the replacement, or None to keep the call.
        """
        # A new module, because the functions are updated in place.
        module = tvm.IRModule(dict(self.module.functions_items()))
        weights = dict(self.weights)
        entries = {}
        used: set[str] = set()
        for name, entry in self.entries.items():
            rebuilder = Rebuilder(module, name, entry, weights)
            module, entries[name] = rebuilder.run(visit)
            used.update(entries[name].weights)
        kept = {name: array for name, array in weights.items() if name in used}
        return Program(relax.transform.Normalize()(module), entries, kept)


class Rebuilder:
    """Rewrites one Relax function, without dead bindings and unused weights.

    Bindings that only the result reads come last: kernels that write results cannot be part of a
    CUDA graph, and would split it.

    Parameters
    ----------
    module : tvm.IRModule
        Holds the function.
    name : str
        Of the function.
    entry : Entry
        Its signature.
    weights : dict of str to LazyArray
        Derived weights are added.
    """

    def __init__(
        self, module: tvm.IRModule, name: str, entry: Entry, weights: dict[str, LazyArray]
    ) -> None:
        self.function = module[name]
        self.module = module
        self.weights = weights
        self._name = name
        self._entry = entry
        self._builder = relax.BlockBuilder(module)
        self._bindings: list[tuple[relax.Var, relax.Expr]] = []
        self._definitions: dict[relax.Var, relax.Expr] = {}
        self._weight_vars: dict[str, relax.Var] = {}
        self._weight_names: dict[relax.Var, str] = {}
        self._replacement: dict[relax.Var, relax.Expr] = {}
        self._replacing: set[relax.Expr] = set()
        self._uses: Counter[relax.Var] = Counter()

    def definition(self, var: relax.Expr) -> relax.Expr | None:
        """Return the value bound to `var`; None for an input, a weight or a literal."""
        return self._definitions.get(var) if isinstance(var, relax.Var) else None

    def call(self, var: relax.Expr, *ops: str, only_use: bool = False) -> relax.Call | None:
        """Return the call that defines `var` if it calls one of the operators.

        With `only_use`, only if `var` is read once, so that the reader may absorb the call.
        """
        value = self.definition(var)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if value.op.name not in ops or (only_use and self._uses[var] > 1):
            return None
        return value

    def array(self, var: relax.Expr) -> LazyArray | None:
        """Return the value of a weight or a literal; None for other expressions."""
        if isinstance(var, GenericConst):
            return LazyArray.of(var.value.numpy())
        name = self._weight_names.get(var) if isinstance(var, relax.Var) else None
        return None if name is None else self.weights[name]

    def weight(self, array: LazyArray | np.ndarray, parent: relax.Expr, change: str) -> relax.Var:
        """Add a weight derived from `parent`; `change` becomes part of its name."""
        array = LazyArray.of(array)
        base = f"{self._weight_names.get(parent, 'constant')}:{change}"
        name, number = base, 1
        while name in self.weights and not self.weights[name].same(array):
            number += 1
            name = f"{base}{number}"
        self.weights.setdefault(name, array)
        return self._weight_var(name)

    def current(self, expr: relax.Expr) -> relax.Expr:
        """Return the new function's expression for one of the old function."""
        return self._substitute(expr)

    def emit(self, expr: relax.Expr, *, like: relax.Var | None = None) -> relax.Var:
        """Bind `expr` to a new variable, named after the old variable `like`."""
        expr = self._builder.normalize(expr)
        var = relax.DataflowVar("v" if like is None else like.name, expr.ty)
        self._bindings.append((var, expr))
        self._definitions[var] = expr
        self._uses[var] = 1
        return var

    def add_kernel(self, function: tvm.tirx.PrimFunc, name: str) -> relax.GlobalVar:
        """Add a kernel to the module, or return the structurally equal one that is there."""
        return add_kernel(self._builder, function, name)

    def run(
        self, visit: Callable[[Rebuilder, relax.Var, relax.Call], relax.Var | None]
    ) -> tuple[tvm.IRModule, Entry]:
        """Rewrite the function; return the module that holds it, and its new signature."""
        inputs = list(self.function.params[: len(self._entry.inputs)])
        for var, name in zip(self.function.params[len(inputs) :], self._entry.weights, strict=True):
            self._replacement[var] = self._weight_var(name)
        old_uses = count_uses(self.function)
        for var in inputs:
            self._uses[var] = old_uses[var]
        self._replacing.update(inputs, self._weight_names)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self._visit_binding(binding, old_uses, visit)
        result = self._substitute(self.function.body.body)
        return self._finish(inputs, result)

    def _visit_binding(
        self,
        binding: relax.Binding,
        old_uses: Counter[relax.Var],
        visit: Callable[[Rebuilder, relax.Var, relax.Call], relax.Var | None],
    ) -> None:
        if not isinstance(binding, relax.VarBinding):
            raise CompileError(
                "the model's graph has a binding that is not an assignment",
                got=type(binding).__name__,
                hint="Data-dependent shapes and control flow are not supported.",
            )
        value = self._substitute(binding.value)
        if isinstance(value, relax.Var | GenericConst):
            new = value
        else:
            replaced = visit(self, binding.var, value) if isinstance(value, relax.Call) else None
            new = self.emit(value, like=binding.var) if replaced is None else replaced
        uses = old_uses[binding.var]
        # Readers of all old variables that the new one replaces.
        self._uses[new] = self._uses[new] + uses if new in self._replacing else uses
        self._replacing.add(new)
        self._replacement[binding.var] = new

    def _substitute(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self._replacement.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._substitute(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            source = self._substitute(expr.tuple_value)
            if isinstance(source, relax.Tuple):
                return source.fields[expr.index]
            return relax.TupleGetItem(source, expr.index)
        if isinstance(expr, relax.Call):
            arguments = [self._substitute(argument) for argument in expr.args]
            return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
        return expr

    def _weight_var(self, name: str) -> relax.Var:
        if name not in self._weight_vars:
            array = self.weights[name]
            var = relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))
            self._weight_vars[name] = var
            self._weight_names[var] = name
        return self._weight_vars[name]

    def _finish(
        self, inputs: Sequence[relax.Var], result: relax.Expr
    ) -> tuple[tvm.IRModule, Entry]:
        definition = self.definition(result)
        if isinstance(definition, relax.Tuple):
            result = definition
        live = set(variables(result))
        read: set[relax.Var] = set()
        kept: list[relax.VarBinding] = []
        last: list[relax.VarBinding] = []
        for var, value in reversed(self._bindings):
            if var in live:
                (kept if var in read else last).append(relax.VarBinding(var, value))
                live.update(variables(value))
                read.update(variables(value))
        names = tuple(name for name, var in self._weight_vars.items() if var in live)
        params = [*inputs, *(self._weight_vars[name] for name in names)]
        output = relax.Var("output", self._builder.normalize(result).ty)
        block = relax.DataflowBlock(
            [*reversed(kept), *reversed(last), relax.VarBinding(output, result)]
        )
        function = relax.Function(
            params,
            relax.SeqExpr([block], output),
            ret_ty=output.ty,
            attrs=self.function.attrs,
        ).with_attr("num_input", len(inputs))
        module = self._builder.get()
        module.update_func(module.get_global_var(self._name), function)
        return module, dataclasses.replace(self._entry, weights=names)


def variables(expr: relax.Expr) -> list[relax.Var]:
    """List the variables in an expression, with repetitions."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Tuple):
        children = list(expr.fields)
    elif isinstance(expr, relax.TupleGetItem):
        children = [expr.tuple_value]
    elif isinstance(expr, relax.Call):
        children = list(expr.args)
    else:
        children = []
    return [var for child in children for var in variables(child)]


def count_uses(function: relax.Function) -> Counter[relax.Var]:
    """Count the reads of each variable of a function."""
    uses: Counter[relax.Var] = Counter()
    for block in function.body.blocks:
        for binding in block.bindings:
            uses.update(variables(binding.value))
    uses.update(variables(function.body.body))
    return uses


def dimensions(expr: relax.Expr) -> tuple[Any, ...]:
    """Return the shape of a tensor: integers, and TensorIR expressions for symbolic sizes."""
    return tuple(
        int(size) if isinstance(size, int | tvm.tirx.IntImm) else size for size in expr.ty.shape
    )


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None if a size is symbolic or unknown."""
    if not isinstance(expr.ty, relax.TensorType) or expr.ty.shape is None:
        return None
    sizes = dimensions(expr)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def element_type(expr: relax.Expr) -> str:
    """Return the element type of a tensor."""
    return str(expr.ty.dtype.dtype)


def with_attributes(call: relax.Call, args: Sequence[relax.Expr], **changed: Any) -> relax.Call:
    """Return a call of the same operator with other arguments and some changed attributes."""
    if not changed:
        return relax.Call(call.op, list(args), call.attrs)
    kind = type(call.attrs).__tvm_ffi_type_info__
    kept = {field.name: getattr(call.attrs, field.name) for field in kind.fields}
    return relax.Call(call.op, list(args), tvm.ir.make_node(kind.type_key, **(kept | changed)))


def transpose_axes(call: relax.Call) -> list[int]:
    """Return the axes of a ``permute_dims``: axis i of its result is axis ``axes[i]`` before it."""
    rank = call.args[0].ty.ndim
    if call.attrs.axes is None:
        return list(reversed(range(rank)))
    return [int(axis) % rank for axis in call.attrs.axes]
