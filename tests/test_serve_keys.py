"""Keys: what the file may hold, what each may do, and that a changed file counts without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task import call
from tunegate.errors import InputError
from tunegate.serve import guard
from tunegate.serve.guard import Bucket, Caller, KeyGuard, Keys, caller_of
from tunegate.serve.keys import Key, add_key, hash_of, make_key, read_keys, remove_key

HASH = hash_of(b"secret")


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "keys.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- the file ----------------------------------------------------------------------------------------------------


def test_a_hash_is_sha_256() -> None:
    """FIPS 180-2's own example."""
    assert hash_of(b"abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    made = {make_key() for _ in range(100)}
    assert len(made) == 100 and all(key.startswith("tg-") and len(key) == 3 + 43 for key in made)  # 256 bits


LIMIT = st.none() | st.integers(1, 10**9)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,9}", fullmatch=True)
MODELS = st.none() | st.lists(st.text(min_size=1, max_size=9).filter(lambda s: s.isprintable()), max_size=3).map(tuple)


@settings(max_examples=25, deadline=None)  # each writes files through to the disk
@given(keys=st.lists(st.tuples(NAMES, LIMIT, LIMIT, MODELS, st.booleans()), max_size=5, unique_by=lambda k: k[0]))
def test_what_is_added_is_read_and_what_is_removed_is_gone(
    keys: list[tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    made = [Key(name, hash_of(name.encode()), *rest) for name, *rest in keys]
    for key in made:
        add_key(path, key)
    assert (read_keys(path) if made else []) == made
    for place, key in enumerate(made):
        remove_key(path, key.name)
        assert read_keys(path) == made[place + 1 :]


def test_other_lines_stay_as_they_were(tmp_path: Path) -> None:
    odd = f'{{ "models": ["a"],   "hash": "{HASH}", "name": "odd" }}'
    path = written(tmp_path, odd, "")
    add_key(path, Key("b", hash_of(b"b")))
    remove_key(path, "b")
    assert path.read_text() == odd + "\n\n"
    with pytest.raises(InputError, match="did you mean 'odd'"):
        remove_key(path, "ood")
    with pytest.raises(InputError, match="the name has a key"):
        add_key(path, Key("odd", hash_of(b"c")))
    with pytest.raises(InputError, match="the new key: name"):
        add_key(path, Key("no name", hash_of(b"c")))
    assert path.read_text() == odd + "\n\n"


def test_everything_wrong_is_told_by_line_and_no_value_is_shown(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f'{{"name": "a", "hash": "{HASH}", "request_per_minute": 3}}',
        '{"name": "b", "hash": "tg-this-is-a-key-itself"}',
        '["tg-this-is-a-key-itself"]',
        f'{{"name": "d", "hash": "{HASH}", "admin": 1, "tokens_per_minute": 0, "models": "all"}}',
        '{"name": "tg-this-is-a-key-itself',
        f'{{"name": "f", "name": "g", "hash": "{HASH}"}}',
        "{}",
    )
    with pytest.raises(InputError) as told:
        read_keys(path)
    text = "\n".join(map(str, told.value.problems))
    for part in (
        ":1: request_per_minute: unknown field", "did you mean 'requests_per_minute'", ":2: hash: not such a value",
        ":3: not a JSON object", ":4: admin:", ":4: tokens_per_minute:", ":4: models:", ":5: not a line of JSON",
        ":6: not a line of JSON", ":7: name: the field is missing", ":7: hash: the field is missing",
    ):  # fmt: skip
        assert part in text, part
    assert "itself" not in text
    twice = written(
        tmp_path, *(f'{{"name": "{n}", "hash": "{h}"}}' for n, h in (("a", HASH), ("b", HASH), ("a", HASH)))
    )
    with pytest.raises(InputError) as told:
        read_keys(twice)
    assert [(p.what, p.where.rpartition(":")[2]) for p in told.value.problems] == [
        ("the name stands twice", "3"), ("two names have one key", "2"), ("two names have one key", "3"),
    ]  # fmt: skip


@given(data=st.binary(max_size=60))
def test_no_bytes_are_a_traceback(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        read_keys(path)


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_bucket_by_hand() -> None:
    """60 a minute: one a second."""
    bucket = Bucket()
    assert bucket.wait(60, 100.0) == 0
    bucket.spend(60, 60, 100.0)
    assert bucket.wait(60, 100.0) == 1.0 and bucket.wait(60, 100.25) == 0.75 and bucket.wait(60, 101.0) == 0
    bucket.spend(60, 31, 101.0)  # 30 are owed
    assert bucket.wait(60, 101.0) == 31.0
    assert bucket.left(60, 1000.0) == 60  # never more than a minute's


@given(rate=st.integers(1, 1000), pauses=st.lists(st.floats(0, 5), min_size=1, max_size=200))
def test_no_window_has_more_than_its_rate(rate: int, pauses: list[float]) -> None:
    caller, now, taken = Caller(Key("a", HASH, rate)), 0.0, 0
    for pause in pauses:
        now += pause
        seconds, limit = caller.ask(now)
        taken += seconds == 0
        assert (seconds == 0) == (limit == "") and taken <= rate + now * rate / 60 + 1e-6
        if seconds:
            assert 0 < seconds <= 60 / rate + 1e-6


def test_a_key_that_must_wait_for_tokens_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.time, "monotonic", lambda: 0.0)
    caller = Caller(Key("a", HASH, 2, 600))
    assert caller.ask(0.0) == (0.0, "")
    caller.use(609)
    for _ in range(5):
        assert caller.ask(0.0) == (1.0, "600 tokens a minute")
    assert caller.ask(1.0)[0] == 0.0 and "requests" in caller.ask(1.0)[1]


# --- in front ----------------------------------------------------------------------------------------------------


class Asked:
    """A guard before an application that answers with the name of its caller."""

    def __init__(self, keys: Keys):
        self._guard = KeyGuard(self._app, keys)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200, "headers": []})
        await send({"body": json.dumps(caller_of(scope).key.name).encode()})

    def __call__(self, key: str | None, method: str = "POST", path: str = "/v1/x") -> tuple[int, Any, dict[str, str]]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        asyncio.run(self._guard(scope, None, send))  # type: ignore[arg-type]
        head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], json.loads(sent[1]["body"]), head


def test_each_key_has_limits_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    path = tmp_path / "keys"
    add_key(path, Key("slow", hash_of(b"1"), requests_per_minute=2))
    add_key(path, Key("free", hash_of(b"2")))
    asked = Asked(Keys(("VARIABLE", "0"), path))
    assert [asked(key)[:2] for key in ("0", "1", "2")] == [(200, "VARIABLE"), (200, "slow"), (200, "free")]
    assert [asked(key)[0] for key in ("3", "", None)] == [401] * 3
    assert asked("1")[0] == 200
    status, body, headers = asked("1")
    assert (status, headers["retry-after"], body["error"]["code"]) == (429, "30", "rate_limit_exceeded")
    assert asked("1", "GET")[0] == 200 and [asked("2")[0] for _ in range(9)] == [200] * 9
    now[0] += 29.5
    assert asked("1")[2]["retry-after"] == "1"
    now[0] += 0.5
    assert asked("1")[0] == 200 and asked("1")[0] == 429


def test_the_file_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "tunegate.serve")
    path = tmp_path / "keys"
    add_key(path, Key("a", hash_of(b"1"), requests_per_minute=1))
    asked = Asked(Keys(file=path))
    assert asked("1")[0] == 200 and asked("1")[0] == 429 and asked("2")[0] == 401
    add_key(path, Key("b", hash_of(b"2")))
    assert asked("2")[0] == 401  # it was looked at just now
    now[0] += 1.0
    assert asked("2")[0] == 200 and asked("1")[0] == 429  # what was spent stays spent
    path.write_text("{broken tg-secret", encoding="utf-8")
    for _ in range(3):
        now[0] += 1.0
        assert asked("2")[0] == 200
    path.unlink()
    now[0] += 1.0
    assert asked("2")[0] == 200
    told = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert (
        len(told) == 2 and all("the keys stay as they were" in text for text in told) and "tg-secret" not in str(told)
    )
    add_key(path, Key("a", hash_of(b"1"), requests_per_minute=60))
    now[0] += 1.0
    assert asked("2")[0] == 401 and asked("1")[0] == 200


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_shows_a_key_once(tmp_path: Path) -> None:
    file = ["--file", str(tmp_path / "keys.jsonl")]
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--model", "support*", "--model", "x"]
    said = call("keys", "add", "team-a", *file, *limits)
    key = said.out.strip()
    assert said.code == 0 and said.err.strip() == "the key of team-a; it is shown this once:"
    assert read_keys(tmp_path / "keys.jsonl") == [Key("team-a", hash_of(key.encode()), 60, 9000, ("support*", "x"))]
    assert key not in (tmp_path / "keys.jsonl").read_text()
    made = json.loads(call("keys", "add", "root", "--admin", *file, "--json").out)
    assert Keys(file=tmp_path / "keys.jsonl").find(made["key"].encode()) is not None
    listed = json.loads(call("keys", "list", *file, "--json").out)["keys"]
    assert listed == [
        {"name": "team-a", "requests_per_minute": 60, "tokens_per_minute": 9000, "models": ["support*", "x"]},
        {"name": "root", "admin": True},
    ]
    table = call("keys", "list", *file).out
    assert "support*, x" in table and "sha256" not in table
    assert call("keys", "remove", "team-a", *file).code == 0
    wrong = call("keys", "remove", "roof", *file)
    assert wrong.code == 2 and "did you mean 'root'" in wrong.err
    none = call("keys", "list", "--file", str(tmp_path / "none"))
    assert none.code == 2 and "tunegate keys add" in none.err
