"""``dcnv3-tvm worker``: measure for tuning sessions on other machines."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Final

from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.cli.tune import parse_address

HELP: Final = "serve measurements to tuning sessions on other machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--tracker", required=True, metavar="HOST:PORT", help="TVM's RPC tracker to register with"
    )
    parser.add_argument(
        "--key", required=True, help="name of this kind of device, as sessions give it by --rpc-key"
    )
    parser.add_argument(
        "--host", default="0.0.0.0", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=9090, help="first port to try (default: %(default)s)"
    )
    parser.add_argument(
        "--address", help="under which others reach this machine, if not the one the tracker sees"
    )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def execute(arguments: argparse.Namespace) -> Result:
    """Serve until interrupted."""
    tracker = parse_address(arguments.tracker, "--tracker")
    from dcnv3_tvm.tuning.worker import serve

    print(
        f"serving as {arguments.key} for the tracker {arguments.tracker}; Ctrl-C ends it. Whoever "
        "reaches this server can run code on this machine.",
        file=sys.stderr,
        flush=True,
    )
    # As services are stopped: the server has processes of its own, which must end with it.
    signal.signal(signal.SIGTERM, _interrupt)
    serve(
        tracker,
        arguments.key,
        host=arguments.host,
        ports=(arguments.port, arguments.port + 109),
        address=arguments.address,
    )
    return Result({"key": arguments.key, "tracker": arguments.tracker}, "ended")
