"""A spot-check of a run: people judge the answers of base and adapter without being told which is which.

The folder ``review/`` of the run holds all there is to it, so a process can be killed at any moment:

- ``items.json``: the selection with its texts, the hashes of the files it was taken from, and a random key. Which
  answer stands on the left follows from the key, the reviewer and the item; a half of a reviewer's items has the
  adapter there.
- ``log.jsonl``: one line a click, flushed to the disk before the click is acknowledged. The latest line of an item and
  reviewer counts. A reviewer who has finished sees which answer was whose, and can change nothing any more.
- ``labels.jsonl``, ``*.items.jsonl``, ``measures.json``: what :meth:`Review.export` makes of the log.

How verdicts combine: an answer is accepted by a reviewer if it is ``good``; ``partly`` is not enough. An item counts as
accepted if more than half of its reviewers accept it, and its preference is the mean of theirs, a tie being a half.
The measures take the reviewers who have finished, so nobody stops where the figures look well.

It knows no page; ``server`` shows it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tunegate.errors import InputError
from tunegate.evaluation.measures import Source, save_measures
from tunegate.files import explain_os_error, flush_path, hash_file, hash_json, read_json, write_json, write_jsonl
from tunegate.report.selection import Item

FOLDER, ITEMS, LOG, LABELS = "review", "items.json", "log.jsonl", "labels.jsonl"
SCHEMA = "Review/1"
SUBJECTS = ("adapter", "base")
VERDICTS = ("good", "partly", "bad")
SIDES, TIE = ("left", "right"), "tie"
LONGEST_NAME, LONGEST_NOTE = 60, 4000  # characters
POINTS = {"adapter": 1.0, TIE: 0.5, "base": 0.0}


class Refused(Exception):
    """A click that cannot be taken, with the reason in words; ``late``: because the reviewer has finished."""

    def __init__(self, why: str, *, late: bool = False):
        super().__init__(why)
        self.late = late


@dataclass(frozen=True)
class Verdict:
    """One reviewer on one item; None where a question is still open."""

    row_id: str
    adapter: str | None
    base: str | None
    preferred: str | None
    note: str
    reviewer: str
    at: str

    @property
    def complete(self) -> bool:
        return None not in (self.adapter, self.base, self.preferred)


@dataclass(frozen=True)
class Log:
    """What the log comes to: reviewer → row id → the latest verdict; and who has finished, in that order."""

    verdicts: dict[str, dict[str, Verdict]]
    finished: list[str]

    def of(self, reviewer: str) -> dict[str, Verdict]:
        return self.verdicts.get(reviewer, {})

    def complete(self, *, finished: bool = False) -> list[Verdict]:
        """Every complete verdict; ``finished``: only of reviewers who have finished."""
        return [
            verdict
            for reviewer, mine in self.verdicts.items()
            for verdict in mine.values()
            if verdict.complete and (reviewer in self.finished or not finished)
        ]


@dataclass(frozen=True)
class Review:
    """The selection of one run. ``of``: the number of test items it stands for; ``source``: file → its hash."""

    run: Path
    task: str
    items: list[Item]
    of: int
    seed: int
    asked: int
    source: dict[str, str]
    key: str

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    # --- the selection on disk ------------------------------------------------------------------------------------

    def save(self) -> None:
        fields = {"task": self.task, "of": self.of, "seed": self.seed, "asked": self.asked, "source": self.source}
        items = [asdict(item) for item in self.items]
        write_json(self.folder / ITEMS, {"schema": SCHEMA, **fields, "key": self.key, "items": items})

    @classmethod
    def load(cls, run: Path) -> Review:
        """The review that was begun in ``run``. :class:`InputError` if its file is damaged, or if the answers are no
        longer those that it was taken from."""
        path = run / FOLDER / ITEMS
        fix = f"remove {run / FOLDER} to begin a new review; its log holds what people said so far"
        try:
            data = read_json(path)
            if data.pop("schema") != SCHEMA:
                raise ValueError("another version")
            review = TypeAdapter(cls).validate_json(json.dumps({**data, "run": str(run)}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            got = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError("cannot read the review's items", where=str(path), got=got, fix=fix) from None
        changed = [name for name, digest in review.source.items() if _hash_of(run / name) != digest]
        if changed:
            raise InputError(
                "the answers are no longer those that were selected for review", where=str(path),
                expected="the files that it was taken from, unchanged", got=f"{', '.join(changed)} differs", fix=fix,
            )  # fmt: skip
        return review

    # --- who sees what --------------------------------------------------------------------------------------------

    def sides(self, reviewer: str) -> list[tuple[str, str]]:
        """For each item the subjects on the left and on the right, as this reviewer sees them."""
        n = len(self.items)
        order = sorted(range(n), key=lambda i: hash_json([self.key, "side", reviewer, i]))
        odd = int(hash_json([self.key, "odd", reviewer])[-1], 16) % 2
        left = set(order[: (n + odd) // 2])
        return [SUBJECTS if i in left else SUBJECTS[::-1] for i in range(n)]

    def seen(self, reviewer: str, log: Log) -> list[dict[str, Any]]:
        """The reviewer's verdicts as ``left``, ``right``, ``preferred`` and ``note``, in the order of the items."""
        found, mine = [], log.of(reviewer)
        for item, (left, right) in zip(self.items, self.sides(reviewer), strict=True):
            given = mine.get(item.row_id)
            if given is None:
                found.append({"left": None, "right": None, "preferred": None, "note": ""})
                continue
            by_subject = {"adapter": given.adapter, "base": given.base}
            names: dict[str | None, str] = {left: "left", right: "right", TIE: TIE}
            preferred = names.get(given.preferred)
            found.append(
                {"left": by_subject[left], "right": by_subject[right], "preferred": preferred, "note": given.note}
            )
        return found

    # --- the log --------------------------------------------------------------------------------------------------

    def log(self) -> Log:
        """Read the log. A line that a killed process left unfinished was never acknowledged and is passed over."""
        found, path = Log({}, []), self.folder / LOG
        known = {item.row_id for item in self.items}
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
            try:
                event = json.loads(line)
                reviewer = event["reviewer"]
                if event.get("finished"):
                    if reviewer not in found.finished:
                        found.finished.append(reviewer)
                    continue
                event.pop("left")
                verdict = Verdict(**event)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if verdict.row_id in known:
                found.verdicts.setdefault(reviewer, {})[verdict.row_id] = verdict
        return found

    def record(self, reviewer: str, place: int, seen: dict[str, Any]) -> Verdict:
        """Take one click: what ``reviewer`` says about item ``place``. :class:`Refused` if it makes no sense."""
        item, (left, right) = self.items[place], self.sides(reviewer)[place]
        mine = {left: seen["left"], right: seen["right"]}
        preferred = {"left": left, "right": right}.get(seen["preferred"], seen["preferred"])
        if item.base == item.adapter and seen["left"] != seen["right"]:
            raise Refused("both answers are the same text: they have one verdict")
        preferred = _settled(mine["adapter"], mine["base"], preferred, same=item.base == item.adapter)
        verdict = Verdict(item.row_id, mine["adapter"], mine["base"], preferred, seen["note"], reviewer, now())
        with self._locked():
            if reviewer in self.log().finished:
                raise Refused(f"{reviewer} has finished this review; its verdicts are final", late=True)
            self._append({**asdict(verdict), "left": left})
        return verdict

    def finish(self, reviewer: str) -> None:
        """Close the reviewer's verdicts and export. :class:`Refused` while an item is open."""
        with self._locked():
            log = self.log()
            if reviewer not in log.finished:
                done = {row for row, verdict in log.of(reviewer).items() if verdict.complete}
                if missing := len(self.items) - len(done):
                    raise Refused(f"{missing} of {len(self.items)} items are not judged yet")
                self._append({"reviewer": reviewer, "finished": True, "at": now()})
        self.export()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, among threads and among processes."""
        with _THREADS, explain_os_error(self.folder):
            handle = (self.folder / ".lock").open("a+")
            try:
                with contextlib.suppress(ImportError):  # Windows: no flock; one process a review there
                    import fcntl

                    fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                handle.close()

    def _append(self, event: dict[str, Any]) -> None:
        """One more line, on the disk when this returns; after a line that was cut off, on a new one."""
        path = self.folder / LOG
        with explain_os_error(path), path.open("ab+") as handle:
            size = handle.seek(0, os.SEEK_END)
            cut_off = False
            if size:
                handle.seek(size - 1)
                cut_off = handle.read(1) != b"\n"
            line = json.dumps(event, ensure_ascii=False).encode("utf-8") + b"\n"
            handle.write(b"\n" * cut_off + line)
            handle.flush()
            os.fsync(handle.fileno())
        if not size:
            flush_path(path.parent)

    # --- what comes out -------------------------------------------------------------------------------------------

    def labels(self, log: Log) -> list[dict[str, Any]]:
        """Every complete verdict, by reviewer and in the order of the items."""
        order = {item.row_id: i for i, item in enumerate(self.items)}
        found = sorted(log.complete(), key=lambda v: (v.reviewer, order[v.row_id]))
        return [asdict(verdict) for verdict in found]

    def export(self) -> list[dict[str, Any]]:
        """Write ``labels.jsonl``, and for the gate, once somebody has finished, item files and ``measures.json``."""
        with self._locked():
            log = self.log()
            labels = self.labels(log)
            write_jsonl(self.folder / LABELS, labels)
            if log.finished:
                for subject in SUBJECTS:
                    write_jsonl(self.folder / f"{subject}.items.jsonl", self.combined(log, subject))
                mine, bases = f"{FOLDER}/adapter.items.jsonl", {"base": f"{FOLDER}/base.items.jsonl"}
                sources = {
                    "review.accept": Source("proportion", mine, "accepted", references=bases),
                    "review.preferred": Source("mean", mine, "preferred"),
                }
                save_measures(self.folder, sources)
        return labels

    def combined(self, log: Log, subject: str) -> list[dict[str, Any]]:
        """One line an item: what those who have finished say of ``subject``'s answer together."""
        by_row: dict[str, list[Verdict]] = {}
        for verdict in log.complete(finished=True):
            by_row.setdefault(verdict.row_id, []).append(verdict)
        rows = []
        for item in self.items:
            given = by_row[item.row_id]
            good = sum(getattr(verdict, subject) == "good" for verdict in given)
            points = sum(POINTS[str(verdict.preferred)] for verdict in given) / len(given)
            preferred = points if subject == "adapter" else 1.0 - points
            rows.append({"row_id": item.row_id, "accepted": 2 * good > len(given), "preferred": preferred,
                         "reviewers": len(given)})  # fmt: skip
        return rows


_THREADS = threading.Lock()


def _settled(adapter: str | None, base: str | None, said: str | None, *, same: bool) -> str | None:
    """The preference, as far as two verdicts settle it: none while one is missing, a tie between equal texts, the
    answer with the better verdict; ``said`` where both are equal. :class:`Refused` if ``said`` contradicts."""
    if adapter is None or base is None:
        found = None
    elif same:
        found = TIE
    elif adapter != base:
        found = "adapter" if VERDICTS.index(adapter) < VERDICTS.index(base) else "base"
    else:
        return said
    if said not in (None, found):
        raise Refused("the preference does not follow from the two verdicts")
    return found


def _hash_of(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None


def new_review(
    run: Path, task: str, items: Sequence[Item], of: int, seed: int, asked: int, source: Sequence[str]
) -> Review:
    """Begin a review of ``items``, taken from the files ``source`` of the run."""
    hashes = {name: hash_file(run / name) for name in source}
    review = Review(run, task, list(items), of, seed, asked, hashes, os.urandom(16).hex())
    review.save()
    return review


def reviewer_name(text: str) -> str:
    """A reviewer's name as it is stored; :class:`InputError` if it is none."""
    name = unicodedata.normalize("NFC", " ".join(text.split()))
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        expected = f"1 to {LONGEST_NAME} printable characters"
        raise InputError("not a name of a reviewer", where="--reviewer", expected=expected, got=text)
    return name


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
