"""Backends of a benchmark: this library and the runtimes it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import installed_version

if TYPE_CHECKING:
    from dcnv3_tvm.bench.runners import BackendRunner
    from dcnv3_tvm.frontend.onnx import FormName

PEER_TOLERANCE: Final = 1e-3
"""Largest error of a peer in float32. Peers normalise sampling points to [-1, 1], which costs
digits; a wrong computation is off by far more."""

BF16_PEER_TOLERANCE: Final = 5e-2
"""Largest relative L2 error of a peer in bfloat16. It also rounds activations between layers to 8
bits; a wrong computation is off by some tens of percent."""

OURS: Final = "dcnv3-tvm"
"""Name of this library's backend, to which all others are compared."""

UNTUNED: Final = "untuned"
"""Name of this library's backend without tuning records."""

COMPILE: Final = "compile"
"""Name of ``torch.compile``."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend with the inputs of a problem in place.

    Parameters
    ----------
    runner : BackendRunner
        Computes the outputs; its calls are timed.
    tolerance : float
        Largest accepted error, in the error measure of the problem.
    reference : list of array or tensor, optional
        Reference outputs, if they differ from the problem's because the inputs do.
    """

    runner: BackendRunner
    tolerance: float
    reference: list[Any] | None = None


Builders = Mapping[str, Callable[[], Backend]]
"""What prepares each backend of a case by its name, in the order in which they are run."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A backend to compare with, as ``--against`` selects it.

    Parameters
    ----------
    name : str
        Value of ``--against``.
    packages : tuple of str
        Distributions it needs.
    form : str, optional
        How DCNv3 is expressed in the ONNX file that it reads; None for PyTorch and this library.
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
    packages: tuple[str, ...] = ()
    form: FormName | None = None
    tolerance: float = PEER_TOLERANCE
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    by_default: bool = True
    gradients: bool = False

    @property
    def missing(self) -> list[str]:
        """Distributions that are not installed."""
        return [package for package in self.packages if installed_version(package) is None]


_EXPORT: Final = ("torch", "onnx", "onnxscript")

PEERS: Final = (
    Peer("torch", ("torch",), gradients=True),
    Peer(COMPILE, ("torch",), gradients=True),
    Peer("onnxruntime", ("onnxruntime", *_EXPORT), "grid-sample"),
    Peer("onnxruntime-deform", ("onnxruntime", *_EXPORT), "deform-conv"),
    Peer("openvino", ("openvino", *_EXPORT), "grid-sample"),
    Peer(
        "openvino-bf16",
        ("openvino", *_EXPORT),
        "grid-sample",
        tolerance=BF16_PEER_TOLERANCE,
        dtypes=("bfloat16",),
    ),
    Peer(UNTUNED, by_default=False),
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
