"""Reviews without a run behind them, for the tests of the spot-check, and a client that speaks to their server."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunegate.report.review import Review, new_review
from tunegate.report.selection import Item
from tunegate.report.server import ReviewServer

SOURCE = "test/adapter.items.jsonl"
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</article></main><h1 id=owned>owned</h1>",
    "&lt;b&gt; &amp; \u2028 \u202e override \x07 \ufeff '\"`${1}",
)


def item(name: str, base: str = "", adapter: str = "", **fields: Any) -> Item:
    """An item whose answers are its name with the subject left out of the text."""
    given: dict[str, Any] = {
        "row_id": f"rows.jsonl:{name}",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {name}?"}],
        "reference": f"reference {name}",
        "base": base or f"first text of {name}",
        "adapter": adapter or f"second text of {name}",
        "base_score": 0.0,
        "adapter_score": 1.0,
    }
    return Item(**{**given, **fields})


def begin(run: Path, items: Sequence[Item] | int = 4) -> Review:
    """A review in a run folder that holds nothing else."""
    (run / "test").mkdir(parents=True)
    (run / SOURCE).write_text("{}\n", encoding="utf-8")
    if isinstance(items, int):
        items = [item(str(n)) for n in range(items)]
    return new_review(run, "intents", items, of=100, seed=0, asked=len(items), source=[SOURCE])


def click(left: str | None, right: str | None, preferred: str | None = None, note: str = "") -> dict[str, Any]:
    return {"left": left, "right": right, "preferred": preferred, "note": note}


def judge(review: Review, reviewer: str, place: int, adapter: str, base: str, preferred: str = "tie") -> None:
    """Record a whole verdict, said of the subjects."""
    sides = review.sides(reviewer)[place]
    by_subject = {"adapter": adapter, "base": base}
    side = {sides[0]: "left", sides[1]: "right"}.get(preferred, preferred)
    left, right = (by_subject[s] for s in sides)
    review.record(reviewer, place, click(left, right, side if left == right else None))


class Client:
    """Speaks to one server; ``sent`` is every byte that came back, heads included."""

    def __init__(self, port: int, token: str):
        self.port, self.token, self.sent = port, token, b""

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """``path`` from the token on, or a whole one that begins with a slash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        whole = path if path.startswith("/") else f"/{self.token}/{path}"
        connection.request(method, whole, data, {**given, **(headers or {})})
        reply = connection.getresponse()
        found = reply.read()
        connection.close()
        self.sent += str(sorted((k, v) for k, v in reply.getheaders() if k != "Date")).encode() + found
        return reply.status, dict(reply.getheaders()), found

    def state(self, reviewer: str) -> dict[str, Any]:
        status, _, data = self.ask("GET", f"state?reviewer={reviewer}")
        assert status == 200, data
        found: dict[str, Any] = json.loads(data)
        return found

    def click(self, reviewer: str, place: int, verdict: dict[str, Any]) -> int:
        return self.ask("POST", "verdict", {"reviewer": reviewer, "item": place, **verdict})[0]

    def finish(self, reviewer: str) -> tuple[int, Any]:
        status, _, data = self.ask("POST", "finish", {"reviewer": reviewer})
        return status, json.loads(data)


@contextlib.contextmanager
def serving(review: Review) -> Iterator[tuple[ReviewServer, Client]]:
    with ReviewServer(review) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server, Client(server.server_port, server.token)
        finally:
            server.shutdown()
            thread.join(10)
