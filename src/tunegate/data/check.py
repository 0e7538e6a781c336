"""What a careful reader would say about the data before anyone trains on it, without a tokenizer.

Each check looks at the splits and adds findings: an error stops a run, a warning should be read, a note is for
information. A finding counts every case and shows a few, by row id. Checks that need tokens are made elsewhere
and join the same report through :meth:`CheckReport.add`.

It changes no row and prints nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from tunegate.data.duplicates import THRESHOLD, Sketches, find_conflicts, find_duplicates, find_leaks, sketch
from tunegate.data.forms import Loaded
from tunegate.data.rows import excerpt
from tunegate.data.safety_scan import FLAGGED, Guard, scan_rows, scan_stats
from tunegate.data.types import Example

LEVELS = ("error", "warning", "note")
SHOWN = 5
FEWEST, MOST = 500, 50_000  # labelled training examples: below, prompts usually do as well; above, a sample does
MAX_LABELS = 200
SHORT_ANSWER = 64  # characters
MAJORITY = 0.8
RARE_LABEL = 5  # rows


@dataclass(frozen=True)
class Finding:
    """``code`` is stable and meant for programs; ``count`` is how many rows, pairs or labels are concerned."""

    level: str
    code: str
    message: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"unknown level {self.level!r}, expected one of {', '.join(LEVELS)}")


@dataclass
class CheckReport:
    """Findings in the order they were made, and plain numbers about the data."""

    findings: list[Finding] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)

    @property
    def ok(self) -> bool:
        """True if nothing stops a run; there may be warnings."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings], "stats": self.stats}


def check_examples(
    splits: Mapping[str, list[Example]],
    loaded: Sequence[Loaded] = (),
    threshold: float = THRESHOLD,
    guard: Guard | None = None,
) -> CheckReport:
    """The token-free checks over ``splits`` (train, valid, test, in this order of trust) and what was loaded.

    ``threshold`` is the Jaccard similarity from which two inputs are near duplicates. ``guard`` is asked about rows
    whose request is one for harm (``safety_scan``); without it the wording of the answer decides.
    """
    report = CheckReport()
    _sizes(report, splits)
    _bad_rows(report, loaded)
    _duplicates_and_leaks(report, splits, threshold)
    _groups(report, splits)
    _conflicts(report, splits)
    _labels(report, splits)
    _harm(report, splits, guard)
    return report


def _some(items: Iterable[str], limit: int = SHOWN) -> list[str]:
    return [item for item, _ in zip(items, range(limit), strict=False)]


def _sizes(report: CheckReport, splits: Mapping[str, list[Example]]) -> None:
    report.stats["rows"] = {name: len(rows) for name, rows in splits.items()}
    report.stats["groups"] = {
        name: len({e.group for e in rows if e.group is not None}) for name, rows in splits.items()
    }
    n = len(splits.get("train", ()))
    if "train" in splits and n < FEWEST:
        message = f"{n} training rows, fewer than {FEWEST}: try prompts first, and compare the adapter with them"
        report.add(Finding("warning", "few_rows", message, n))
    if n > MOST:
        message = f"{n} training rows, more than {MOST}: a sample may do as well in a fraction of the time"
        report.add(Finding("note", "many_rows", message, n))
    for name, rows in splits.items():
        if not rows:
            report.add(Finding("warning", "empty_split", f"the {name} split is empty"))


def _bad_rows(report: CheckReport, loaded: Sequence[Loaded]) -> None:
    read, bad = sum(one.rows for one in loaded), sum(one.bad_rows for one in loaded)
    report.stats["read"] = {"rows": read, "bad_rows": bad, "form": "+".join(dict.fromkeys(one.form for one in loaded))}
    report.stats["files"] = {source: digest for one in loaded for source, digest in one.files.items()}
    problems = [problem for one in loaded for problem in one.bad]
    kinds = Counter(_kind(problem.what) for problem in problems)
    report.stats["problems"] = dict(kinds.most_common())
    for level, skipped in (("error", False), ("warning", True)):
        some = [one for one in loaded if one.bad and (one.on_bad_row == "skip") is skipped]
        if some:
            rows, total = sum(one.bad_rows for one in some), sum(one.rows for one in some)
            end = "are left out" if skipped else "cannot be used: mend them, or set `on_bad_row: skip`"
            shown = _some(str(problem) for one in some for problem in one.bad)
            report.add(Finding(level, "bad_rows", f"{rows} of {total} rows {end}", rows, shown))


def _kind(what: str) -> str:
    """A problem's text without its place in the row, so that equal problems count together."""
    return " ".join("N" if word.isdigit() else word for word in what.replace(":", " :").split()).replace(" :", ":")


def _duplicates_and_leaks(report: CheckReport, splits: Mapping[str, list[Example]], threshold: float) -> None:
    everything = sketch([example for rows in splits.values() for example in rows])
    sketches: dict[str, Sketches] = {}
    start = 0
    for name, rows in splits.items():
        sketches[name] = everything.take(start, start + len(rows))
        start += len(rows)
    duplicates: dict[str, Any] = {}
    for name, rows in splits.items():
        found = find_duplicates(rows, threshold, sketches[name])
        extra = sum(len(group) - 1 for group in found.exact)
        alike = len({row_id for pair in found.near for row_id in pair[:2]})
        duplicates[name] = {"exact_rows": extra, "near_pairs": len(found.near), "near_rows": alike}
        if extra:
            message = f"{name}: {extra} rows repeat another row, input and answer"
            groups = (" = ".join(group[:3]) + (" = ..." if len(group) > 3 else "") for group in found.exact)
            report.add(Finding("warning", "duplicates_exact", message, extra, _some(groups)))
        if found.near:
            message = f"{name}: {alike} rows have a near duplicate ({len(found.near)} pairs, Jaccard >= {threshold:g})"
            report.add(Finding("note", "duplicates_near", message, alike, _pairs(found.near)))
    report.stats["duplicates"] = duplicates
    leaks: dict[str, Any] = {}
    for reference, candidate in combinations(splits, 2):
        leak = find_leaks(splits[reference], splits[candidate], threshold, (sketches[reference], sketches[candidate]))
        leaks[f"{candidate} in {reference}"] = {"exact": len(leak.exact), "near": len(leak.near)}
        n = len(splits[candidate])
        if leak.exact:
            message = f"{len(leak.exact)} of {n} {candidate} inputs are also in {reference}: scores will flatter"
            shown = _some(f"{a} = {b}" for a, b in leak.exact)
            report.add(Finding("warning", "leak_exact", message, len(leak.exact), shown))
        if leak.near:
            message = f"{len(leak.near)} of {n} {candidate} inputs are nearly in {reference} (Jaccard >= {threshold:g})"
            report.add(Finding("warning", "leak_near", message, len(leak.near), _pairs(leak.near)))
    report.stats["leaks"] = leaks


def _pairs(pairs: list[tuple[str, str, float]]) -> list[str]:
    """The most alike first."""
    ordered = sorted(pairs, key=lambda pair: -pair[2])
    return _some(f"{a} ~ {b} ({similarity:.2f})" for a, b, similarity in ordered)


def _groups(report: CheckReport, splits: Mapping[str, list[Example]]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for name, rows in splits.items():
        for example in rows:
            if example.group is not None:
                sides[example.group].add(name)
    torn = [f"{excerpt(group)} in {', '.join(sorted(names))}" for group, names in sides.items() if len(names) > 1]
    if torn:
        message = f"{len(torn)} groups lie in more than one split"
        report.add(Finding("warning", "group_leak", message, len(torn), _some(torn)))


def _conflicts(report: CheckReport, splits: Mapping[str, list[Example]]) -> None:
    conflicts = find_conflicts([example for rows in splits.values() for example in rows])
    report.stats["conflicts"] = len(conflicts)
    if conflicts:
        shown = (
            f"{text}: " + "; ".join(f"{excerpt(answer, 30)} ({ids[0]})" for answer, ids in _first(answers))
            for text, answers in conflicts
        )
        message = f"{len(conflicts)} inputs have different answers in different rows"
        report.add(Finding("warning", "conflicts", message, len(conflicts), _some(shown)))


def _first(answers: dict[str, list[str]], limit: int = 3) -> list[tuple[str, list[str]]]:
    return list(answers.items())[:limit]


def _harm(report: CheckReport, splits: Mapping[str, list[Example]], guard: Guard | None) -> None:
    """Rows that would teach harm or remove refusals. Validation rows are part of it: they pick the checkpoint."""
    rows = [example for name, examples in splits.items() if name != "test" for example in examples]
    flags = scan_rows(rows, guard)
    report.stats["safety"] = scan_stats(flags, len(rows))
    for kind, message in FLAGGED.items():
        found = [flag for flag in flags if flag.kind == kind]
        if found:
            shown = _some(f"{flag.row_id}: {flag.reason}: {flag.shown}" for flag in found)
            report.add(Finding("warning", kind, message.format(n=len(found)), len(found), shown))


def looks_like_labels(answers: Counter[str]) -> bool:
    """Whether answers are labels: short, and few that repeat or many that repeat often."""
    rows, distinct = sum(answers.values()), len(answers)
    if not all(0 < len(answer) <= SHORT_ANSWER and "\n" not in answer for answer in answers):
        return False
    return rows >= distinct * (2 if distinct <= MAX_LABELS else 10)


def _labels(report: CheckReport, splits: Mapping[str, list[Example]]) -> None:
    counts = {name: Counter(e.answer.strip() for e in rows if e.messages) for name, rows in splits.items()}
    train = counts.get("train", Counter())
    report.stats["distinct_answers"] = {name: len(answers) for name, answers in counts.items()}
    if not train or not looks_like_labels(train):
        return
    (top, most), n = train.most_common(1)[0], sum(train.values())
    report.stats["labels"] = {name: dict(answers.most_common()) for name, answers in counts.items()}
    report.stats["majority"] = {"label": top, "share": most / n}
    if len(train) == 1:
        report.add(Finding("warning", "one_label", f"every training row has the answer {excerpt(top)}", n))
    elif most / n >= MAJORITY:
        message = f"{most / n:.0%} of the training rows have the answer {excerpt(top)}: always saying so scores as much"
        report.add(Finding("warning", "imbalance", message, most))
    rare = [f"{excerpt(label)}: {k}" for label, k in reversed(train.most_common()) if k < RARE_LABEL]
    if rare:
        message = f"{len(rare)} of {len(train)} labels have fewer than {RARE_LABEL} training rows"
        report.add(Finding("note", "rare_labels", message, len(rare), _some(rare)))
    for name, answers in counts.items():
        unseen = [f"{excerpt(label)}: {k} rows" for label, k in answers.items() if label not in train]
        if unseen:
            message = f"{len(unseen)} labels of {name} are in no training row: they cannot be learned"
            report.add(Finding("warning", "unseen_labels", message, len(unseen), _some(unseen)))
    spelt: dict[str, set[str]] = defaultdict(set)
    for label in {label for answers in counts.values() for label in answers}:
        spelt["".join(c for c in label.casefold() if c.isalnum()) or label].add(label)
    twice = [" / ".join(excerpt(label) for label in sorted(same)) for same in spelt.values() if len(same) > 1]
    if twice:
        message = f"{len(twice)} labels are spelt in more than one way"
        report.add(Finding("warning", "label_spelling", message, len(twice), _some(sorted(twice))))
