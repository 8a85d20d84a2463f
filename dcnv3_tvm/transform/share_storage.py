"""Let intermediate results of different sizes share storage, so that more stay in cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import tvm_ffi
from tvm import relax, tirx
from tvm.sym import Analyzer

from dcnv3_tvm.transform.ir import variables

_ALLOC_STORAGE: Final = "relax.memory.alloc_storage"
_ALLOC_TENSOR: Final = "relax.memory.alloc_tensor"
_EXPRESSIONS: Final = (relax.Call, relax.Var, relax.Tuple, relax.TupleGetItem)
_TYPICAL: Final = 224
"""Value of dynamic sizes, such as an image's, for which storage is chosen."""


class _Storage:
    """A storage: what its sizes may become, and until which binding its tensor is read."""

    def __init__(self, call: relax.Call, number: int) -> None:
        self.call = call
        self.var = relax.Var(f"storage{number}", relax.AnyType())
        self.sizes: list[Any] = []
        self.typical = 0
        self.end = -1

    def hold(self, size: Any, typical: int, end: int) -> None:
        if not any(tvm_ffi.structural_equal(size, other) for other in self.sizes):
            self.sizes.append(size)
        self.typical = max(self.typical, typical)
        self.end = end

    def binding(self) -> relax.VarBinding:
        size = self.sizes[0]
        for other in self.sizes[1:]:
            size = tirx.max(size, other)
        arguments = [relax.ShapeExpr([size]), *self.call.args[1:]]
        return relax.VarBinding(self.var, relax.Call(self.call.op, arguments, self.call.attrs))


def share_storage(function: relax.Function) -> relax.Function:
    """Assign storage anew, to each tensor one whose earlier tensors are no longer read.

    TVM plans storage of dynamic size for tensors of one size only, and among static ones of equal
    size takes turns, so that fewer stay in cache. Here a storage has the largest size of its
    tensors, whatever the dynamic sizes are, and a tensor takes the smallest that holds it, of equal
    ones always the same.

    Parameters
    ----------
    function : relax.Function
        With the storage that TVM has planned.
    """
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    for binding in bindings:
        # A cast finds sizes that storage which is allocated before cannot have.
        if isinstance(binding, relax.MatchCast) or not isinstance(binding.value, _EXPRESSIONS):
            return function
    planned = {each.var: each.value for each in bindings if is_storage(each)}
    ends = _last_reads(bindings, function.body.body)
    storages: dict[Any, list[_Storage]] = defaultdict(list)
    place: dict[relax.Var, _Storage] = {}
    for position, binding in enumerate(bindings):
        if _operator(binding) != _ALLOC_TENSOR:
            continue
        old = planned[binding.value.args[0]]
        (size,) = old.args[0].values
        group = storages[tuple(map(str, old.args[1:]))]
        typical = typical_size(size)
        free = [each for each in group if each.end < position]
        large = [each for each in free if each.typical >= typical]
        if large:
            chosen = min(large, key=lambda each: each.typical)
        elif free:
            chosen = max(free, key=lambda each: each.typical)
        else:
            chosen = _Storage(old, sum(map(len, storages.values())))
            group.append(chosen)
        chosen.hold(size, typical, ends[binding.var])
        place[binding.var] = chosen
    return _rebuilt(function, bindings, place)


def _rebuilt(
    function: relax.Function,
    bindings: Sequence[relax.Binding],
    place: dict[relax.Var, _Storage],
) -> relax.Function:
    allocated: set[_Storage] = set()
    result: list[relax.Binding] = []
    for binding in bindings:
        if is_storage(binding):
            continue
        if binding.var in place:
            storage, call = place[binding.var], binding.value
            if storage not in allocated:
                allocated.add(storage)
                result.append(storage.binding())
            arguments = [storage.var, *call.args[1:]]
            result.append(relax.VarBinding(binding.var, relax.Call(call.op, arguments, call.attrs)))
        else:
            result.append(binding)
    body = relax.SeqExpr([relax.BindingBlock(result)], function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _last_reads(bindings: Sequence[relax.Binding], result: relax.Expr) -> dict[relax.Var, int]:
    """Return for each tensor in a storage the position of the last binding that reads it."""
    ends: dict[relax.Var, int] = {}
    # A view or a tuple holds the tensors from which it is made.
    held: dict[relax.Var, set[relax.Var]] = {}
    for position, binding in enumerate(bindings):
        read = {tensor for var in variables(binding.value) for tensor in held.get(var, ())}
        held[binding.var] = {binding.var} if _operator(binding) == _ALLOC_TENSOR else read
        ends |= dict.fromkeys(held[binding.var] | read, position)
    for var in variables(result):
        ends |= dict.fromkeys(held.get(var, ()), len(bindings))
    return ends


def is_storage(binding: relax.Binding) -> bool:
    """Return whether a binding allocates storage."""
    return _operator(binding) == _ALLOC_STORAGE


def storage_size(binding: relax.Binding) -> Any:
    """Return the bytes of a binding that allocates storage."""
    return binding.value.args[0].values[0]


def _operator(binding: relax.Binding) -> str:
    return str(getattr(getattr(binding.value, "op", None), "name", ""))


def typical_size(expression: Any) -> int:
    """Return the value of a size for dynamic sizes such as an image's."""
    typical = tirx.IntImm("int64", _TYPICAL)
    return int(
        Analyzer().simplify(tvm_ffi.structural_map(expression, (tirx.Var, lambda _: typical)))
    )
