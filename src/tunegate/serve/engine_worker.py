"""The engine's process: messages in, passes, tokens out (``wire`` says how they look).

A thread reads the socket; the main thread takes what came, makes one pass, and sends what it gave as one write. What is
asked about adapters waits for no pass: it is handed on, and answered, by other threads. Nothing to do means waiting for
a message. When the front is gone, so is this process.

``python -m tunegate.serve.engine_worker FD [debug]`` is for ``engine_process``, not for people.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from tunegate.engine.memory import resident_bytes
from tunegate.errors import TunegateError
from tunegate.serve.engine_core import EngineCore
from tunegate.serve.jobs import EngineOptions, Job, Loaded, Tokens, to_json
from tunegate.serve.telling import begin, tell
from tunegate.serve.wire import error_json, line

DEBUG = "debug"  # of the command line: errors are logged whole
_SWITCH = 2e-4  # seconds: a pass comes back from the kernels many times, and must not wait for an adapter's reader


class Worker:
    """One engine on one socket."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.lines = connection.makefile("rb")
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.out: list[bytes] = []
        self._sending = threading.Lock()

    def run(self) -> int:
        options = EngineOptions(**json.loads(self.lines.readline()))
        try:
            self.core = EngineCore(options, self._send_tokens, lambda: self.inbox.put({}))
        except TunegateError as error:
            self.connection.sendall(line({"failed": error_json(error)}))
            return 1
        gc.collect()
        gc.freeze()  # what is here by now stays, and a collection that looks at it all would hold up a pass
        self.connection.sendall(line({"started": to_json(self.core.facts)}))
        threading.Thread(target=self._listen, daemon=True).start()
        while self._take_messages():
            if self.core.busy:
                self.core.step()
            if self.out:
                self._write(b"".join(self.out))
                self.out.clear()
        return 0

    def _write(self, data: bytes) -> None:
        with self._sending:
            self.connection.sendall(data)

    def _listen(self) -> None:
        try:
            for text in self.lines:
                message = json.loads(text)
                if not self._about_adapters(message):
                    self.inbox.put(message)
        except OSError:
            pass
        self.inbox.put(None)

    def _take_messages(self) -> bool:
        """Do what has been asked; False once it is over. Waits where there is nothing else to do."""
        wait = not self.core.busy and not self.out
        while True:
            try:
                message = self.inbox.get(wait)
            except queue.Empty:
                return True
            if message is None or "stop" in message:
                return False
            self._do(message)
            wait = False

    def _do(self, message: dict[str, Any]) -> None:
        if "job" in message:
            folder = None if message["folder"] is None else Path(message["folder"])
            self.core.submit(message["job"], Job.from_json(message["data"]), folder)
        elif "cancel" in message:
            self.core.cancel(message["cancel"])
        elif "stats" in message:
            self.out.append(line({"answer": message["stats"], "data": {**self.core.stats(), "rss": resident_bytes()}}))

    def _about_adapters(self, message: dict[str, Any]) -> bool:
        """Do what the message asks about adapters; False if it is about something else."""
        adapters = self.core.adapters
        if "load" in message:
            answer = functools.partial(self._answer, message["load"])
            adapters.load(message["key"], Path(message["folder"]), message["pinned"], answer)
        elif "identify" in message:
            adapters.identify(Path(message["folder"]), functools.partial(self._answer, message["identify"]))
        elif "unload" in message:
            adapters.unload(message["unload"])
        else:
            return False
        return True

    def _answer(self, number: int, found: Loaded | str | TunegateError) -> None:
        """From any thread."""
        if isinstance(found, TunegateError):
            self._write(line({"error": number, "data": error_json(found)}))
        else:
            self._write(line({"answer": number, "data": to_json(found) if isinstance(found, Loaded) else found}))

    def _send_tokens(self, number: int, found: Tokens | TunegateError) -> None:
        if isinstance(found, TunegateError):
            self.out.append(line({"error": number, "data": error_json(found)}))
        else:
            self.out.append(line({"tokens": number, "data": to_json(found)}))


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the front decides
        signal.signal(number, signal.SIG_IGN)
    begin(debug=DEBUG in sys.argv[2:])
    disable_progress_bar()
    sys.setswitchinterval(_SWITCH)
    try:
        return Worker(socket.socket(fileno=int(sys.argv[1]))).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the front is gone
    except Exception as error:
        tell("the engine failed", error)
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that reads an adapter does not hold up the end
