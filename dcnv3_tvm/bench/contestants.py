"""Who is measured: this library, and what people run otherwise."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dcnv3_tvm.bench.problems import Array, Problem

OURS: Final = "dcnv3-tvm"
"""Name of this library's contestant, to which all others are compared."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Something that computes a problem's outputs.

    Parameters
    ----------
    name : str
        What the report calls it.
    call : callable
        Computes once, with inputs in place; this is timed.
    outputs : callable
        Turns what `call` returned into arrays; not timed.
    tolerance : float
        Largest error accepted, as a fraction of max|reference|.
    """

    name: str
    call: Callable[[], Any]
    outputs: Callable[[Any], list[Array]]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to run the model that is not this library's.

    Parameters
    ----------
    name : str
        As ``--against`` takes it.
    meaning : str
        What it is, in a line.
    packages : tuple of str
        Distributions it needs.
    builder : str
        ``module:function`` of ``(problem, threads) -> Contestant``.
    """

    name: str
    meaning: str
    packages: tuple[str, ...]
    builder: str

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if version(package) is None]

    def build(self, problem: Problem, threads: int) -> Contestant:
        """Make the contestant ready for a problem."""
        module, _, function = self.builder.partition(":")
        build: Callable[[Problem, int], Contestant]
        build = getattr(importlib.import_module(module), function)
        return build(problem, threads)


_EXPORT: Final = ("torch", "onnx", "onnxscript")

PEERS: Final = (
    Peer(
        "torch",
        "PyTorch eager, grid_sample",
        ("torch",),
        "dcnv3_tvm.bench.peers:eager",
    ),
    Peer(
        "compile",
        "torch.compile of the same",
        ("torch",),
        "dcnv3_tvm.bench.peers:compiled",
    ),
    Peer(
        "onnxruntime",
        "ONNX Runtime, exported with GridSample",
        ("onnxruntime", *_EXPORT),
        "dcnv3_tvm.bench.peers:onnxruntime",
    ),
    Peer(
        "onnxruntime-deform",
        "ONNX Runtime, rewritten with DeformConv",
        ("onnxruntime", *_EXPORT),
        "dcnv3_tvm.bench.peers:onnxruntime_deform",
    ),
    Peer(
        "openvino",
        "OpenVINO in float32, from the same export",
        ("openvino", *_EXPORT),
        "dcnv3_tvm.bench.peers:openvino",
    ),
)
"""Every peer, in the order of their turns."""


def select_peers(names: Iterable[str]) -> list[Peer]:
    """Find peers by name.

    Raises
    ------
    InvalidArgumentError
        If a name is unknown.
    """
    known = {peer.name: peer for peer in PEERS}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise InvalidArgumentError(
                "there is no such peer to measure against",
                got=repr(name),
                allowed=", ".join(known),
            )
    return [peer for peer in PEERS if peer.name in wanted]


def version(package: str) -> str | None:
    """Return the installed version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def error_of(outputs: Sequence[Array], reference: Sequence[Array]) -> float:
    """Return the largest error over all outputs, as a fraction of max|reference| of each.

    NaN if the number of outputs or a shape is another, or an element is not finite.
    """
    import numpy as np

    if len(outputs) != len(reference):
        return float("nan")
    errors = [
        float(np.abs(output.astype(np.float64) - truth).max() / (np.abs(truth).max() or 1.0))
        if output.shape == truth.shape
        else float("nan")
        for output, truth in zip(outputs, reference, strict=True)
    ]
    return float(np.max(errors))
