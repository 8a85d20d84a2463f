"""Run a function in a forked child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Final

LIMIT: Final = 60.0
"""Seconds after which the child hangs."""


def in_child(function: Callable[[], bool]) -> bool:
    """Return what a function returns in a forked child; fail if the child raises or hangs."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = 0 if function() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 1), f"the child ended with {code}"
            return code == 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")
