"""Let entries for several image sizes allocate storage of equal sizes, so that they share it.

TVM's pool of memory hands a storage out again only for a request of the same size. With sizes of
their own, entries would each leave their storages in the pool: a model would hold the sum.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.sym import Analyzer

from dcnv3_tvm.transform.share_storage import is_storage, storage_size, typical_size

_MAX_SIZE: Final = 2**31


def align_storage(functions: Sequence[relax.Function]) -> list[relax.Function]:
    """Enlarge storages: the largest of each function get one size, the next another, and so on.

    Parameters
    ----------
    functions : sequence of relax.Function
        With planned storage. Dynamic sizes of one name are equal in all of them.
    """
    ranked = [_by_rank(function) for function in functions]
    sizes: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for storages in ranked:
        for place, binding in storages.items():
            sizes[place].append(storage_size(binding))
    return [
        _enlarged(function, {binding.var: sizes[place] for place, binding in storages.items()})
        for function, storages in zip(functions, ranked, strict=True)
    ]


def _by_rank(function: relax.Function) -> dict[tuple[Any, ...], relax.Binding]:
    """Return the storages of a function by kind of memory and rank, the largest first."""
    kinds: dict[tuple[str, ...], list[relax.Binding]] = defaultdict(list)
    for block in function.body.blocks:
        for binding in filter(is_storage, block.bindings):
            kinds[tuple(map(str, binding.value.args[1:]))].append(binding)
    for bindings in kinds.values():
        bindings.sort(key=lambda binding: typical_size(storage_size(binding)), reverse=True)
    return {
        (*kind, rank): binding
        for kind, bindings in kinds.items()
        for rank, binding in enumerate(bindings)
    }


def _enlarged(function: relax.Function, sizes: dict[relax.Var, list[Any]]) -> relax.Function:
    """Replace the size of each storage by the largest of its own and others'."""
    variables = {
        str(size): size
        for param in function.params
        for size in getattr(param.ty, "shape", None) or ()
        if isinstance(size, tirx.Var)
    }
    analyzer = Analyzer()
    for variable in variables.values():
        analyzer.bind(variable, tvm.ir.Range(0, _MAX_SIZE))

    def enlarged(binding: relax.Binding) -> relax.Binding:
        if not is_storage(binding):
            return binding
        # Those that depend on a size that this function does not have are left out.
        known = [
            tvm_ffi.structural_map(size, (tirx.Var, lambda var: variables[str(var)]))
            for size in sizes[binding.var]
            if all(str(var) in variables for var in tirx.analysis.undefined_vars(size))
        ]
        call = binding.value
        largest = _maximum([storage_size(binding), *known], analyzer)
        arguments = [relax.ShapeExpr([largest]), *call.args[1:]]
        return relax.VarBinding(binding.var, relax.Call(call.op, arguments, call.attrs))

    blocks = [relax.BindingBlock(list(map(enlarged, b.bindings))) for b in function.body.blocks]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _maximum(sizes: Sequence[Any], analyzer: Analyzer) -> Any:
    """Return the maximum, without sizes that are never the largest."""
    kept: list[Any] = []
    for size in itertools.chain.from_iterable(map(_alternatives, sizes)):
        if not any(analyzer.can_prove(size <= other) for other in kept):
            kept = [other for other in kept if not analyzer.can_prove(other <= size)] + [size]
    return functools.reduce(tirx.max, kept)


def _alternatives(size: Any) -> list[Any]:
    if isinstance(size, tirx.Max):
        return [*_alternatives(size.a), *_alternatives(size.b)]
    return [size]
