"""RPC server that measures kernels for tuning sessions on other machines."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Final

from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import MissingDependencyError, TargetError
from dcnv3_tvm.machine import enable_amx
from dcnv3_tvm.runtime.cuda import load_runtime
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.tuning import cpu_caches
from dcnv3_tvm.tuning.rpc import check_tracker, import_tvm_rpc

_POLL_SECONDS: Final = 0.5


def serve(
    tracker: tuple[str, int],
    key: str,
    *,
    host: str = "0.0.0.0",
    ports: tuple[int, int] = (9090, 9199),
    address: str | None = None,
) -> None:
    """Start TVM's RPC server, register it with a tracker, and serve until interrupted.

    Each measurement runs in its own process, so a crash fails only that measurement. Anyone who
    can reach the server can run arbitrary code on it: use it only in a trusted network.

    Parameters
    ----------
    tracker : (str, int)
        Host and port of the tracker.
    key : str
        Key to register under; servers with identical devices share a key.
    host : str
        Address to listen on.
    ports : (int, int)
        Range of ports; the first free one is used.
    address : str, optional
        Address at which clients reach this machine; by default the one the tracker sees.

    Raises
    ------
    TuningError
        If the tracker cannot be reached.
    MissingDependencyError
        If a package that TVM's RPC needs is not installed.
    """
    rpc = import_tvm_rpc()
    check_tracker(*tracker)
    # TVM's default is half of the logical cores, even on a CPU without hyper-threads.
    os.environ.setdefault(TVM_NUM_THREADS.name, str(default_threads()))
    server: Any = rpc.Server(
        host=host,
        port=ports[0],
        port_end=ports[1],
        key=key,
        tracker_addr=tracker,
        custom_addr=address,
        silent=True,
        server_init_callback=_prepare_devices,
    )
    try:
        while server.proc.is_alive():
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()


def _prepare_devices() -> None:
    """Prepare a measuring process: caches, AMX, and the CUDA runtime if there is a GPU."""
    cpu_caches.register()
    enable_amx()
    with contextlib.suppress(TargetError, MissingDependencyError):
        load_runtime()
