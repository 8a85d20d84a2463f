"""Describe a target for what was compiled for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm import targets
from dcnv3_tvm.runtime.metadata import TargetInfo

if TYPE_CHECKING:
    from tvm.target import Target


def target_info(target: Target) -> TargetInfo:
    """Describe a target."""
    from tvm.target import codegen

    on_gpu = targets.is_gpu(target)
    host = target.host if on_gpu else target
    triple = host.attrs.get("mtriple") or codegen.llvm_get_system_triple()
    return TargetInfo(
        kind=target.kind.name,
        triple=str(triple),
        mcpu=str(host.attrs.get("mcpu", "")),
        features=tuple(sorted(targets.target_features(host))),
        slug=targets.target_slug(target),
        text=str(target),
        arch=str(target.attrs["arch"]) if on_gpu else "",
    )
