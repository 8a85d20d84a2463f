"""The program ``dcnv3-tvm``, also ``python -m dcnv3_tvm``."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line in a process of its own, and return its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until a command runs, Ctrl-C ends the process: there is nothing to clean up or to report.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dcnv3_tvm import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
