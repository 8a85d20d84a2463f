"""DCNv3 and InternImage compiled with TVM.

Public names are imported on first use, so ``import dcnv3_tvm`` imports neither PyTorch nor TVM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.errors import raise_if_tvm_is_missing

if TYPE_CHECKING:
    from dcnv3_tvm.compiler.compile import compile_artifact, compile_model
    from dcnv3_tvm.compiler.explain import explain
    from dcnv3_tvm.compiler.operator import compile_op
    from dcnv3_tvm.errors import DCNv3Error
    from dcnv3_tvm.functional import dcnv3
    from dcnv3_tvm.runtime import CompiledModel, load
    from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

__version__ = "0.1.0"

_MODULES = {
    "CompiledModel": "dcnv3_tvm.runtime",
    "DCNv3Error": "dcnv3_tvm.errors",
    "DCNv3Params": "dcnv3_tvm.spec",
    "DCNv3Spec": "dcnv3_tvm.spec",
    "compile_artifact": "dcnv3_tvm.compiler.compile",
    "compile_model": "dcnv3_tvm.compiler.compile",
    "compile_op": "dcnv3_tvm.compiler.operator",
    "dcnv3": "dcnv3_tvm.functional",
    "explain": "dcnv3_tvm.compiler.explain",
    "load": "dcnv3_tvm.runtime",
}

__all__ = [
    "CompiledModel",
    "DCNv3Error",
    "DCNv3Params",
    "DCNv3Spec",
    "compile_artifact",
    "compile_model",
    "compile_op",
    "dcnv3",
    "explain",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise_if_tvm_is_missing(error, f"dcnv3_tvm.{name}")
        raise
    value = globals()[name] = getattr(module, name)  # Later uses do not come here.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
