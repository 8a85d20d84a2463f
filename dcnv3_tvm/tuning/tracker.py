"""TVM's RPC tracker, where servers register and sessions ask for them."""

from __future__ import annotations

import socket
from types import ModuleType
from typing import Final

from dcnv3_tvm.errors import MissingDependencyError
from dcnv3_tvm.tuning.journal import SessionError

Address = tuple[str, int]
"""Host and port."""

_TIMEOUT: Final = 5.0


def tvm_rpc() -> ModuleType:
    """Import TVM's RPC.

    Raises
    ------
    MissingDependencyError
        If a package that it needs is not installed.
    """
    try:
        from tvm import rpc
        from tvm.rpc import tracker  # noqa: F401 - it needs tornado
    except ImportError as error:
        raise MissingDependencyError(
            "a package that TVM needs for RPC is not installed",
            got=error,
            hint="Run: pip install 'dcnv3-tvm[tune]'",
        ) from error
    module: ModuleType = rpc
    return module


def check_tracker(address: Address) -> None:
    """Refuse an address at which nobody listens; TVM would try for a minute.

    Raises
    ------
    SessionError
        If the tracker cannot be reached.
    """
    try:
        socket.create_connection(address, timeout=_TIMEOUT).close()
    except OSError as error:
        host, port = address
        raise SessionError(
            "the RPC tracker cannot be reached",
            got=f"{host}:{port} ({error.strerror or error})",
            hint=f"Start it there: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port} "
            f"--port-end {port + 1}",
        ) from error


def count_servers(address: Address, key: str) -> int:
    """Count the servers that have registered under a key.

    Raises
    ------
    SessionError
        If the tracker cannot be reached.
    MissingDependencyError
        As by `tvm_rpc`.
    """
    rpc = tvm_rpc()
    check_tracker(address)
    summary = rpc.connect_tracker(*address).summary()
    return sum(server["key"] == f"server:{key}" for server in summary["server_info"])
