"""Processes that we fork die with us, however we end: no worker outlives its launcher.

A worker that is busy when its launcher is killed works on, for hours if its share is large, on files that nobody wants.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """From now on every process that this one forks gets SIGKILL when this one dies. Linux; once is enough."""
    global _installed
    if _installed:
        return
    _installed = True
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = [0]

    def remember() -> None:
        parent[0] = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent[0]:  # it died between the fork and this line
            os._exit(1)

    os.register_at_fork(before=remember, after_in_child=in_child)


_installed = False
