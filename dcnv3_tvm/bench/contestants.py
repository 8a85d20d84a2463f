"""Who is measured: this library, and what people run otherwise."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import installed_version

if TYPE_CHECKING:
    from dcnv3_tvm.bench.problems import Array, Problem
    from dcnv3_tvm.bench.sessions import Session

MAX: Final = "max"
"""Name of an error measure: max|error| / max|reference| of an output."""

NORM: Final = "norm"
"""Name of an error measure: ‖error‖ / ‖reference‖ of an output.

For types so short that the largest of many errors says more of their number than of their size.
"""

PEER_TOLERANCE: Final = 1e-3
"""Largest error of a peer in float32: they compute the sampling points in coordinates from -1 to 1,
which costs digits, and a wrong computation is off by far more."""

BF16_PEER_TOLERANCE: Final = 5e-2
"""Largest error of a peer that computes in bfloat16, as ‖error‖ / ‖reference‖: it stores what lies
between the layers with 8 bits, too, and a wrong computation is off by some tens of percent."""

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
        Largest error accepted, in the measure of the problem.
    reference : list of array or None
        Its true outputs, where its inputs are not those of the others.
    peak_bytes : int or None
        Memory it takes on the device.
    """

    name: str
    call: Callable[[], Any]
    outputs: Callable[[Any], list[Any]]
    tolerance: float
    reference: list[Any] | None = None
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to run the model beside this library as it is.

    Parameters
    ----------
    name : str
        As ``--against`` takes it.
    meaning : str
        What it is, in a line.
    packages : tuple of str
        Distributions it needs.
    builder : str
        ``module:function`` of ``(problem, threads) -> Session``.
    tolerance : float
        Largest error accepted, in the measure of the problem.
    dtypes : tuple of str
        Of the cases it takes part in.
    by_default : bool
        Whether it takes part when no peers are named.
    """

    name: str
    meaning: str
    packages: tuple[str, ...]
    builder: str
    tolerance: float = PEER_TOLERANCE
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    by_default: bool = True

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if installed_version(package) is None]

    def build(self, problem: Problem, threads: int) -> Contestant:
        """Make the contestant ready for a problem."""
        module, _, function = self.builder.partition(":")
        build: Callable[[Problem, int], Session]
        build = getattr(importlib.import_module(module), function)
        return Contestant(self.name, *build(problem, threads), self.tolerance)


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
    Peer(
        "openvino-bf16",
        "OpenVINO in bfloat16, from the same export",
        ("openvino", *_EXPORT),
        "dcnv3_tvm.bench.peers:openvino_bf16",
        tolerance=BF16_PEER_TOLERANCE,
        dtypes=("bfloat16",),
    ),
    Peer(
        "untuned",
        "this library, without tuning records",
        (),
        "dcnv3_tvm.bench.ours:untuned",
        by_default=False,
    ),
)
"""Every peer, in the order of their turns."""


def select_peers(names: Iterable[str] | None = None, dtype: str = "float32") -> list[Peer]:
    """Find peers by name, or those by default, that take part in cases of a dtype.

    Raises
    ------
    InvalidArgumentError
        If a name is unknown, or its peer takes no part.
    """
    known = {peer.name: peer for peer in PEERS if dtype in peer.dtypes}
    if names is None:
        return [peer for peer in known.values() if peer.by_default]
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise InvalidArgumentError(
                f"there is no such peer to measure against in {dtype}",
                got=repr(name),
                allowed=", ".join(known),
            )
    return [known[name] for name in known if name in wanted]


def absent(peers: Iterable[Peer]) -> dict[str, str]:
    """Say of each peer that lacks packages which they are."""
    return {
        peer.name: f"not installed: {', '.join(peer.missing)}" for peer in peers if peer.missing
    }


def error_of(outputs: Sequence[Array], reference: Sequence[Array], measure: str = MAX) -> float:
    """Return the largest error over all outputs, measured as `MAX` or as `NORM` says.

    NaN if the number of outputs or a shape is another, or an element is not finite.
    """
    import numpy as np

    def size(array: Array) -> float:
        return float(np.linalg.norm(array) if measure == NORM else np.abs(array).max())

    if len(outputs) != len(reference):
        return float("nan")
    errors = [
        size(output.astype(np.float64) - truth) / (size(truth) or 1.0)
        if output.shape == truth.shape
        else float("nan")
        for output, truth in zip(outputs, reference, strict=True)
    ]
    return float(np.max(errors))
