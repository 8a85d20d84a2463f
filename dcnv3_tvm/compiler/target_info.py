"""Describe a target for what was compiled for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm import machine, targets
from dcnv3_tvm.runtime.metadata import TargetInfo

if TYPE_CHECKING:
    from tvm.target import Target


def target_info(target: Target, *, amx: bool = False) -> TargetInfo:
    """Describe a target.

    Parameters
    ----------
    target : tvm.target.Target
        The target.
    amx : bool
        Whether code that uses AMX was compiled for it. Otherwise its features do not name AMX,
        which LLVM does not use by itself.
    """
    from tvm.target import codegen

    on_gpu = targets.is_gpu(target)
    host = target.host if on_gpu else target
    triple = host.attrs.get("mtriple") or codegen.llvm_get_system_triple()
    used = machine.AMX_FEATURES if amx else frozenset()
    features = targets.target_features(host)
    return TargetInfo(
        kind=target.kind.name,
        triple=str(triple),
        mcpu=str(host.attrs.get("mcpu", "")),
        features=tuple(sorted(f for f in features if not f.startswith("amx") or f in used)),
        slug=targets.artifact_slug(target),
        text=str(target),
        arch=str(target.attrs["arch"]) if on_gpu else "",
    )
