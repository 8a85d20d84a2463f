"""Access to TVM's RPC tracker, which hands out remote devices by key."""

from __future__ import annotations

import dataclasses
import socket
from types import ModuleType
from typing import Final

from dcnv3_tvm.errors import MissingDependencyError, TuningError

_CONNECT_TIMEOUT: Final = 5.0


@dataclasses.dataclass(frozen=True)
class RpcConfig:
    """Remote devices, registered under one key with TVM's RPC tracker.

    Parameters
    ----------
    host, port : str, int
        Address of the tracker.
    key : str
        Key that the servers registered under (``dcnv3-tvm worker --key KEY``).
    workers : int
        Number of servers: measurements that run at the same time.
    """

    host: str
    port: int
    key: str
    workers: int = 1

    @property
    def address(self) -> str:
        """Address of the tracker, as ``host:port``."""
        return f"{self.host}:{self.port}"


def import_tvm_rpc() -> ModuleType:
    """Import ``tvm.rpc``.

    Raises
    ------
    MissingDependencyError
        If a package that TVM's RPC needs is not installed.
    """
    try:
        from tvm import rpc
        from tvm.rpc import tracker  # noqa: F401 - it imports tornado
    except ImportError as error:
        raise MissingDependencyError(
            "a package that TVM's RPC needs is not installed",
            got=error,
            hint='Run: pip install "dcnv3-tvm[tune]"',
        ) from error
    module: ModuleType = rpc
    return module


def check_tracker(host: str, port: int) -> None:
    """Check that the RPC tracker accepts connections; TVM would retry for a minute.

    Raises
    ------
    TuningError
        If the tracker cannot be reached.
    """
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        raise TuningError(
            "the RPC tracker cannot be reached",
            got=f"{host}:{port} ({error.strerror or error})",
            hint="Start it on that machine: python -m tvm.exec.rpc_tracker --host 0.0.0.0 "
            f"--port {port} --port-end {port + 1}",
        ) from error


def count_servers(config: RpcConfig) -> int:
    """Count the servers registered under a key.

    Raises
    ------
    TuningError
        If the tracker cannot be reached.
    MissingDependencyError
        If a package that TVM's RPC needs is not installed.
    """
    rpc = import_tvm_rpc()
    check_tracker(config.host, config.port)
    summary = rpc.connect_tracker(config.host, config.port).summary()
    return sum(server["key"] == f"server:{config.key}" for server in summary["server_info"])
