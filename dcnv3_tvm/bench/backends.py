"""Backends of a benchmark: this library and the runtimes it is compared with."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import installed_version

if TYPE_CHECKING:
    from dcnv3_tvm.bench.problems import Problem
    from dcnv3_tvm.bench.runners import BackendRunner

PEER_TOLERANCE: Final = 1e-3
"""Largest error of a peer in float32. Peers normalise sampling points to [-1, 1], which costs
digits; a wrong computation is off by far more."""

BF16_PEER_TOLERANCE: Final = 5e-2
"""Largest relative L2 error of a peer in bfloat16. It also rounds activations between layers to 8
bits; a wrong computation is off by some tens of percent."""

OURS: Final = "dcnv3-tvm"
"""Name of this library's backend, to which all others are compared."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend with the inputs of a problem in place.

    Parameters
    ----------
    name : str
        Name in the report.
    call : callable
        Computes once; this is timed.
    outputs : callable
        Converts what `call` returned to arrays or tensors; not timed.
    tolerance : float
        Largest accepted error, in the error measure of the problem.
    reference : list of array or tensor, optional
        Reference outputs, if they differ from the problem's because the inputs do.
    peak_bytes : int, optional
        Peak memory of the GPU, or of a process that trains.
    """

    name: str
    call: Callable[[], Any]
    outputs: Callable[[Any], list[Any]]
    tolerance: float
    reference: list[Any] | None = None
    peak_bytes: int | None = None

    @classmethod
    def of(cls, name: str, runner: BackendRunner, tolerance: float) -> Backend:
        """Name what a runner computes."""
        return cls(name, runner.call, runner.outputs, tolerance, peak_bytes=runner.peak_bytes)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A backend to compare with, as ``--against`` selects it.

    Parameters
    ----------
    name : str
        Value of ``--against``.
    packages : tuple of str
        Distributions it needs.
    builder : str
        ``module:function`` of ``(problem, threads) -> BackendRunner``.
    tolerance : float
        Largest accepted error, in the error measure of the problem.
    dtypes : tuple of str
        Dtypes of the problems it is run on.
    by_default : bool
        Whether it is run when ``--against`` is not given.
    gradients : bool
        Whether it computes gradients.
    """

    name: str
    packages: tuple[str, ...]
    builder: str
    tolerance: float = PEER_TOLERANCE
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    by_default: bool = True
    gradients: bool = False

    @property
    def missing(self) -> list[str]:
        """Distributions that are not installed."""
        return [package for package in self.packages if installed_version(package) is None]

    def build(self, problem: Problem, threads: int) -> Backend:
        """Prepare the backend for a problem."""
        module, _, function = self.builder.partition(":")
        build: Callable[[Problem, int], BackendRunner]
        build = getattr(importlib.import_module(module), function)
        return Backend.of(self.name, build(problem, threads), self.tolerance)


_EXPORT: Final = ("torch", "onnx", "onnxscript")

PEERS: Final = (
    Peer("torch", ("torch",), "dcnv3_tvm.bench.peers:eager", gradients=True),
    Peer("compile", ("torch",), "dcnv3_tvm.bench.peers:compiled", gradients=True),
    Peer("onnxruntime", ("onnxruntime", *_EXPORT), "dcnv3_tvm.bench.peers:onnxruntime"),
    Peer(
        "onnxruntime-deform",
        ("onnxruntime", *_EXPORT),
        "dcnv3_tvm.bench.peers:onnxruntime_deform",
    ),
    Peer("openvino", ("openvino", *_EXPORT), "dcnv3_tvm.bench.peers:openvino"),
    Peer(
        "openvino-bf16",
        ("openvino", *_EXPORT),
        "dcnv3_tvm.bench.peers:openvino_bf16",
        tolerance=BF16_PEER_TOLERANCE,
        dtypes=("bfloat16",),
    ),
    Peer("untuned", (), "dcnv3_tvm.bench.ours:untuned", by_default=False),
)
"""All peers, in the order in which they are run."""


def select_peers(
    names: Iterable[str] | None = None, dtype: str = "float32", *, gradients: bool = False
) -> list[Peer]:
    """Return the named peers, or the default ones, that support a dtype.

    Parameters
    ----------
    names : iterable of str, optional
        Names of peers.
    dtype : str
        Dtype of the problems.
    gradients : bool
        Return only peers that compute gradients.

    Raises
    ------
    InvalidArgumentError
        If a name is unknown, or its peer does not support the dtype or gradients.
    """
    known = {
        peer.name: peer
        for peer in PEERS
        if dtype in peer.dtypes and (peer.gradients or not gradients)
    }
    if names is None:
        return [peer for peer in known.values() if peer.by_default]
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise InvalidArgumentError(
                f"unknown backend for {'gradients' if gradients else dtype}",
                got=repr(name),
                allowed=", ".join(known),
            )
    return [known[name] for name in known if name in wanted]


def missing_packages(peers: Iterable[Peer]) -> dict[str, str]:
    """Return which packages are missing, by name of the peers that cannot run without them."""
    return {
        peer.name: f"not installed: {', '.join(peer.missing)}" for peer in peers if peer.missing
    }
