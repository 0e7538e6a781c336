"""``leash.py PARENT COMMAND...``: become the command, and be told to end (SIGTERM) when the parent has ended.

For Linux, run by its path and importing nothing of the package, so that the command's environment may be any. A process
that is killed cannot end its children; the kernel can (prctl's PR_SET_PDEATHSIG, which outlives exec).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def become(parent: int, command: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        sys.exit(1)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error}")


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
