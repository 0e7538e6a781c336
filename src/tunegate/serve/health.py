"""``python -m tunegate.serve.health PORT [SECONDS]``: 0 if the server on this machine answers /health with 200, else 1.

With seconds it asks again until then. For health checks of containers and units, which should need no further program.
It loads nothing of the package.
"""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.error
import urllib.request

TIMEOUT = 3.0


def healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine
    with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT) as reply:
        return bool(reply.status == 200)
    return False


def main(arguments: list[str]) -> int:
    port = int(arguments[0])
    deadline = time.monotonic() + (float(arguments[1]) if len(arguments) > 1 else 0.0)
    while not (found := healthy(port)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
