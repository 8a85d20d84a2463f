"""``dcnv3-tvm worker``: measure kernels for tuning sessions on other machines."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Final

from dcnv3_tvm.cli.arguments import parse_port
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.cli.tune import parse_address

HELP: Final = "measure kernels for tuning sessions on other machines"
EXAMPLE: Final = "dcnv3-tvm worker --tracker 10.0.0.1:9190 --key epyc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--tracker", required=True, metavar="HOST:PORT", help="TVM's RPC tracker to register with"
    )
    parser.add_argument(
        "--key", required=True, help="key of this kind of device, which sessions pass as --rpc-key"
    )
    parser.add_argument(
        "--host", default="0.0.0.0", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=parse_port, default=9090, help="first port to try (default: %(default)s)"
    )
    parser.add_argument(
        "--address", help="address at which clients reach this machine, if the tracker sees another"
    )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def execute(arguments: argparse.Namespace) -> Result:
    """Serve until interrupted."""
    host, port = parse_address(arguments.tracker, "--tracker")
    from dcnv3_tvm.tuning.worker import serve

    print(
        f"registering as {arguments.key} with the tracker {arguments.tracker}; stop with Ctrl-C.\n"
        "warning: anyone who can reach this server can run code on this machine",
        file=sys.stderr,
        flush=True,
    )
    # Service managers stop with SIGTERM; the server must then end its own processes.
    signal.signal(signal.SIGTERM, _interrupt)
    serve(
        (host, port),
        arguments.key,
        host=arguments.host,
        ports=(arguments.port, arguments.port + 109),
        address=arguments.address,
    )
    return Result({"key": arguments.key, "tracker": arguments.tracker}, "stopped")
