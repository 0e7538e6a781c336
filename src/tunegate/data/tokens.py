"""What the rows look like as tokens: rendering them all, checking them, showing them.

``render_all`` is what training and evaluation call: every row comes out rendered and within ``max_tokens``, or the
call fails with all that is wrong, grouped. ``check_tokens`` finds the same things without failing and adds them to
the report of ``check``, with the distribution of row lengths. ``show_rows`` prints rows token by token.

No row is dropped unless ``on_long_row: skip`` asks for it, and then the report says how many. It does not read
files, split or look for duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tunegate.data.check import CheckReport, Finding
from tunegate.data.render import Renderer
from tunegate.data.types import Example, Rendered
from tunegate.errors import InputError, Problem

if TYPE_CHECKING:
    from rich.text import Text

CHUNK = 512  # rows tokenised together; offsets of a chunk are held in memory as Python objects
NAMED = 5  # rows named in a finding
SHOWN_TOKENS = 2000  # a longer row is shown without its middle


def _rendered(examples: Sequence[Example], renderer: Renderer) -> Iterator[tuple[Example, Rendered | Problem]]:
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        yield from zip(chunk, renderer.render_many(chunk), strict=True)


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n:,} rows"


def _names(row_ids: Sequence[str]) -> str:
    more = f" and {len(row_ids) - NAMED:,} more" if len(row_ids) > NAMED else ""
    return ", ".join(row_ids[:NAMED]) + more


def _by_kind(problems: Sequence[Problem]) -> list[tuple[Problem, list[str]]]:
    """Problems of one kind as one, with the ids of its rows; ``where`` names them, ``got`` is that of the first."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for p in problems:
        kinds.setdefault((p.what, p.fix), []).append(p)
    return [
        (Problem(what, _names([p.where for p in rows]), rows[0].expected, rows[0].got, fix), [p.where for p in rows])
        for (what, fix), rows in kinds.items()
    ]


def render_all(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    max_tokens: int,
    on_long_row: Literal["error", "truncate", "skip"] = "error",
    report: CheckReport | None = None,
) -> list[Rendered]:
    """``examples`` rendered, in order, each of at most ``max_tokens`` tokens and with at least one target.

    :class:`InputError` if a row cannot be rendered, has no target, or is too long under ``error``; also under
    ``truncate`` where its last answer alone is too long. ``report`` is told what was cut or skipped.
    """
    rows: list[Rendered] = []
    problems: list[Problem] = []
    long: list[Rendered] = []
    too_long: list[Rendered] = []
    for example, row in _rendered(examples, renderer):
        if isinstance(row, Problem):
            problems.append(row)
        elif len(row) > max_tokens:
            long.append(row)
            cut = renderer.truncate(row, max_tokens) if on_long_row == "truncate" else None
            rows += [cut] if cut else []
            too_long += [] if cut else [row]
        elif not row.n_targets:
            problems.append(Problem(f"no token to learn: {_why_no_target(example, renderer)}", row.row_id))
        else:
            rows.append(row)
    problems = [problem for problem, _ in _by_kind(problems)]
    if too_long and on_long_row != "skip":
        problems.append(_long_problem(too_long, len(examples), max_tokens, on_long_row))
    if problems:
        raise InputError(problems)
    if report is not None and long:
        done = "skipped" if on_long_row == "skip" else f"cut to {max_tokens:,} tokens, the oldest first"
        lost = sum(len(row) - (0 if on_long_row == "skip" else max_tokens) for row in long)
        message = f"{_rows(len(long))} longer than data.max_tokens {done}: {lost:,} tokens lost"
        report.add(Finding("warning", "long_rows", message, len(long), _lengths(long)))
    return rows


def _lengths(rows: Sequence[Rendered]) -> list[str]:
    return [f"{row.row_id} ({len(row):,} tokens)" for row in rows[:NAMED]]


def _long_problem(rows: Sequence[Rendered], n: int, max_tokens: int, on_long_row: str) -> Problem:
    longest = max(len(row) for row in rows)
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    if on_long_row == "truncate":
        what = f"the last answer alone is too long in {len(rows):,} of {_rows(n)}"
        fix = f"`data.max_tokens: {longest}`, shorter answers, or `data.on_long_row: skip`"
    else:
        what = f"too long: {len(rows):,} of {_rows(n)}"
        fix = f"`data.max_tokens: {longest}`, or `data.on_long_row: truncate` (cuts the oldest tokens) or `skip`"
    expected = f"at most {max_tokens:,} tokens a row (data.max_tokens)"
    return Problem(what, expected=expected, got=", ".join(_lengths(rows)) + more, fix=fix)


def _why_no_target(example: Example, renderer: Renderer) -> str:
    answer = example.text if example.text is not None else example.answer
    calls = bool(example.messages) and bool(example.messages[-1].get("tool_calls"))
    if not answer.strip() and not calls:
        return "empty answer"
    if renderer.uses_markers(example.tools):
        return "the template's {% generation %} markers enclose nothing of it"
    return "the template leaves the answer out"


# --- check -------------------------------------------------------------------------------------------------------


def check_tokens(
    splits: Mapping[str, Sequence[Example]],
    renderer: Renderer,
    max_tokens: int,
    report: CheckReport,
    on_long_row: Literal["error", "truncate", "skip"] = "error",
) -> dict[str, list[Rendered]]:
    """Render every split, add what is found to ``report`` and return the rows that could be rendered, uncut.

    ``report.stats["tokens"]`` gets rows, total, targets, median, p95, max and a histogram, over all and a split.
    """
    done: dict[str, list[Rendered]] = {}
    problems: list[Problem] = []
    controls: dict[str, Counter[str]] = {}
    seen: dict[str, list[str]] = {"turns": [], "end": []}
    causes: dict[str, list[str]] = {}
    for name, examples in splits.items():
        done[name] = []
        for example, row in _rendered(examples, renderer):
            if typed := renderer.control_in(example):
                controls[example.row_id] = Counter(typed)
            if isinstance(row, Problem):
                problems.append(row)
                continue
            done[name].append(row)
            if on_long_row == "truncate" and renderer.truncate(row, max_tokens) is None:
                cause = f"truncated, the last answer alone is longer than {max_tokens:,} tokens (data.max_tokens)"
                causes.setdefault(cause, []).append(row.row_id)
            _check_targets(example, row, renderer, causes, seen)
    for problem, ids in _by_kind(problems):
        text = str(Problem(problem.what, "", problem.expected, problem.got, problem.fix))
        report.add(Finding("error", "render", f"{_rows(len(ids))}: {text}", len(ids), ids[:NAMED]))
    for cause, ids in causes.items():
        message = f"no token to learn in {_rows(len(ids))}: {cause}"
        report.add(Finding("error", "no_target", message, len(ids), ids[:NAMED]))
    if ids := seen["end"]:
        message = f"no token that stops generation at the end of the targets in {_rows(len(ids))}"
        report.add(Finding("error", "no_end_of_turn", message, len(ids), ids[:NAMED]))
    if ids := seen["turns"]:
        message = f"not every answer is learned in {_rows(len(ids))}: the template renders it differently later on"
        report.add(Finding("warning", "unlearned_turns", message, len(ids), ids[:NAMED]))
    _report_controls(controls, report)
    everything = [row for rows in done.values() for row in rows]
    _report_long(everything, renderer, max_tokens, report, "error" if on_long_row == "error" else "warning")
    report.stats["tokens"] = {
        **length_stats(everything),
        "splits": {name: length_stats(rows) for name, rows in done.items()},
    }
    return done


def _check_targets(
    example: Example,
    row: Rendered,
    renderer: Renderer,
    causes: dict[str, list[str]],
    seen: dict[str, list[str]],
) -> None:
    stop = set(renderer.stop_ids) if example.text is None else {renderer.eos_id}
    learned = [token for token, target in zip(row.ids[1:], row.target[1:], strict=True) if target]
    if not any(token not in stop for token in learned):
        causes.setdefault(_why_no_target(example, renderer), []).append(row.row_id)
    elif learned[-1] not in stop:
        seen["end"].append(row.row_id)
    turns = sum(message.get("role") == "assistant" for message in example.messages)
    runs = sum(now and not before for before, now in zip((False, *row.target), row.target, strict=False))
    if 0 < runs < turns:
        seen["turns"].append(row.row_id)


def _report_controls(controls: Mapping[str, Counter[str]], report: CheckReport) -> None:
    if not controls:
        return
    total: Counter[str] = Counter()
    for found in controls.values():
        total.update(found)
    tokens = ", ".join(f"{token} {n:,}x" for token, n in total.most_common(NAMED))
    message = f"control tokens in the text of {_rows(len(controls))} ({tokens}): they are encoded as text"
    examples = [f"{row_id} ({', '.join(found)})" for row_id, found in list(controls.items())[:NAMED]]
    report.add(Finding("warning", "control_tokens", message, len(controls), examples))


def _report_long(
    rows: Sequence[Rendered], renderer: Renderer, max_tokens: int, report: CheckReport, level: str
) -> None:
    long = [row for row in rows if len(row) > max_tokens]
    if not long:
        return
    cut = [(row, renderer.truncate(row, max_tokens)) for row in long]
    lost = sum(len(row) - len(kept) for row, kept in cut if kept)
    targets = sum(row.n_targets - kept.n_targets for row, kept in cut if kept)
    whole = sum(kept is None for _, kept in cut)
    message = (
        f"{_rows(len(long))} longer than {max_tokens:,} tokens (data.max_tokens), the longest has "
        f"{max(map(len, long)):,}; truncation would cut {lost:,} tokens, {targets:,} of them targets, "
        f"from {_rows(len(long) - whole)}"
    )
    if whole:
        message += f"; the last answer alone does not fit in {_rows(whole)}"
    report.add(Finding(level, "long_rows", message, len(long), _lengths(long)))


def length_stats(rows: Sequence[Rendered]) -> dict[str, Any]:
    """Row lengths in tokens. ``histogram`` counts rows up to each power of two, from 16; percentiles by rank."""
    lengths = sorted(len(row) for row in rows)
    if not lengths:
        return {"rows": 0, "total": 0, "targets": 0, "median": 0, "p95": 0, "max": 0, "histogram": []}
    buckets: Counter[int] = Counter(max(16, 1 << (n - 1).bit_length()) for n in lengths)
    upto = [1 << e for e in range(min(buckets).bit_length() - 1, max(buckets).bit_length())]
    return {
        "rows": len(lengths),
        "total": sum(lengths),
        "targets": sum(row.n_targets for row in rows),
        "median": lengths[(len(lengths) - 1) // 2],
        "p95": lengths[-(-len(lengths) * 95 // 100) - 1],
        "max": lengths[-1],
        "histogram": [{"upto": n, "rows": buckets[n]} for n in upto],
    }


# --- show --------------------------------------------------------------------------------------------------------


def show_rows(rows: Sequence[Rendered], tokenizer: Any) -> list[Text]:
    """Rows for the terminal: targets green, the rest dim, special tokens reversed, a thin bar between tokens.

    A newline is shown as ⏎ and breaks the line too. Tokens that only together make a character are shown as one,
    with their number behind it.
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [_show(row, tokenizer, special) for row in rows]


def _show(row: Rendered, tokenizer: Any, special: set[int]) -> Text:
    from rich.text import Text

    text = Text()
    text.append(f"{row.row_id}  {len(row):,} tokens, {row.n_targets:,} targets\n", style="bold")
    half = SHOWN_TOKENS // 2
    skipped = range(half, len(row) - half) if len(row) > SHOWN_TOKENS else range(0)
    i = 0
    while i < len(row):
        if i in skipped:
            text.append(f"\n... {len(skipped):,} tokens ...\n", style="bold")
            i = skipped.stop
        n, piece = _piece(row.ids, i, tokenizer, special)
        style = "bold green" if row.target[i] else "dim"
        style += " reverse" if row.ids[i] in special else ""
        shown = piece.replace("\n", "⏎\n") + (f"⟨{n}⟩" if n > 1 else "")
        text.append(shown.removesuffix("\n"), style=style)
        text.append("│\n" if shown.endswith("\n") else "│", style="dim")
        i += n
    return text


def _piece(ids: Sequence[int], i: int, tokenizer: Any, special: set[int]) -> tuple[int, str]:
    """How many tokens from ``i`` on make whole characters, and their text: the text of the window with them less
    that of the window without, so that the space a tokenizer drops at the beginning of a text stays."""
    window = ids[max(0, i - 4) : i]
    before = tokenizer.decode(window, clean_up_tokenization_spaces=False)
    for n in range(1, min(8, len(ids) - i) + 1):
        if n > 1 and ids[i + n - 1] in special:
            break
        both = tokenizer.decode([*window, *ids[i : i + n]], clean_up_tokenization_spaces=False)
        if both.startswith(before) and not both.endswith("\ufffd"):
            return n, both[len(before) :]
    return 1, tokenizer.decode([ids[i]], clean_up_tokenization_spaces=False)
