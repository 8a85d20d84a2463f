"""Choose whether a kernel is compiled for fixed or for dynamic sizes."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.spec import DCNv3Spec

MAX_SIZES: Final = 8
"""Sizes for which a kernel of a problem is compiled. From then on, one kernel serves all others, so
that training on images of many sizes does not compile for each."""

_SEEN: Final[dict[tuple[str, DCNv3Spec], set[DCNv3Spec]]] = {}


def kernel_spec(kind: str, spec: DCNv3Spec) -> DCNv3Spec:
    """Return the specification to compile for a problem: its own, or that of dynamic sizes.

    Parameters
    ----------
    kind : str
        Kind of the kernel.
    spec : DCNv3Spec
        The problem.
    """
    dynamic = dataclasses.replace(spec, batch=None, height=None, width=None)
    seen = _SEEN.setdefault((kind, dynamic), set())
    if len(seen) < MAX_SIZES:
        seen.add(spec)
    return spec if spec in seen else dynamic
