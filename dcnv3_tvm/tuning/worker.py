"""A server that measures for tuning sessions on other machines."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Final

from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import MissingDependencyError, TargetError
from dcnv3_tvm.runtime.cuda import load_runtime
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.tuning.tracker import Address, check_tracker, tvm_rpc

_POLL: Final = 0.5


def serve(
    tracker: Address,
    key: str,
    *,
    host: str = "0.0.0.0",
    ports: tuple[int, int] = (9090, 9199),
    address: str | None = None,
) -> None:
    """Start TVM's RPC server, register it with a tracker, and serve until interrupted.

    Each measurement runs in a process of its own: one that crashes ends that measurement alone.
    Who can reach the server can run any code on it: use it in a network that you trust.

    Parameters
    ----------
    tracker : Address
        Host and port of the tracker.
    key : str
        Under which to register; servers of equal devices share one.
    host : str
        Address to listen at.
    ports : (int, int)
        The first free one is taken.
    address : str, optional
        Under which others reach this machine, if not the one the tracker sees.

    Raises
    ------
    SessionError
        If the tracker cannot be reached.
    MissingDependencyError
        If the packages that TVM needs for RPC are not installed.
    """
    rpc = tvm_rpc()
    check_tracker(tracker)
    # TVM would take half of the logical cores, also where a core has a single thread.
    os.environ.setdefault(TVM_NUM_THREADS.name, str(default_threads()))
    server: Any = rpc.Server(
        host=host,
        port=ports[0],
        port_end=ports[1],
        key=key,
        tracker_addr=tracker,
        custom_addr=address,
        silent=True,
        server_init_callback=_prepare,
    )
    try:
        while server.proc.is_alive():
            time.sleep(_POLL)
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()


def _prepare() -> None:
    """Let the processes of measurements find CUDA, where there is a GPU."""
    with contextlib.suppress(TargetError, MissingDependencyError):
        load_runtime()
