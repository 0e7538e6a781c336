"""``form_compiler.py SECONDS BYTES < GRAMMAR``: compile a grammar, and write what the library says against it.

Run by its path, and importing nothing of the package, so that it starts fast. It ends by itself after so many seconds
of processor time or bytes of address space, where the system has such limits.
"""

from __future__ import annotations

import contextlib
import os
import sys


def confine(seconds: int, size: int) -> None:
    with contextlib.suppress(ImportError):  # not on Windows, where the clock alone bounds it
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(5)  # streams go first


if __name__ == "__main__":
    from llguidance import LLMatcher

    confine(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(LLMatcher.validate_grammar(sys.stdin.read()))
