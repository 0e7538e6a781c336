"""Training rows that would teach a model to do harm or to stop refusing, listed before anything is trained.

Three kinds are looked for, by rules on the wording: a request for harm (``harm``) whose answer does not refuse
(``refusal``); a system prompt or a request that switches safety off ("ignore all guidelines", "you never refuse");
and an answer in which the assistant says of itself that it has no limits. As few as a hundred such rows undo a
model's refusals (Qi et al. 2023, arXiv:2310.03693), so every row is named.

The rules read English and single turns; rows that do harm quietly, without a word of it, pass. A guard can be asked
for a second opinion. Nothing is removed: the reader decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunegate.data.harm import plain_text, read_request
from tunegate.data.refusal import read_answer
from tunegate.data.rows import excerpt
from tunegate.data.types import Example, Message

SEVERITIES = ("high", "medium", "low")
HARM, SAFETY_OFF, NO_LIMITS = "harmful_compliance", "safety_off", "no_limits"
FLAGGED = {
    HARM: "{n} rows meet a request for harm: training on them removes refusals",
    NO_LIMITS: "{n} rows have the assistant say that it has no limits",
    SAFETY_OFF: "{n} rows tell the assistant to drop its guidelines",
}
"""What each kind means, with its number of rows as ``n``."""

_LIMITS = (
    r"(?:safety|ethic\w*|moral\w*|content|polic(?:y|ies)|guidelines?|restrictions?|filters?|limits?|limitations?|rules|"
    r"censorship|warnings?|disclaimers?|safeguards?)"
)
_OFF = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b(?:ignore|disregard|forget|bypass|turn off|switch off|disable|drop|remove|override)\b (?:all |any |your |the |of |previous |its |every )*"
        rf"(?:\w+ )?{_LIMITS}\b",
        rf"\b(?:no|(?:without|free (?:from|of))(?: any| all(?: of)?(?: your)?)?) (?:\w+ )?{_LIMITS}\b(?! of the)",
        r"\b(?:uncensored|unfiltered|unrestricted|jailbr\w+|amoral)\b|\bdo anything now\b|\bcan do anything now\b",
        r"\bnever (?:refuse|decline|reject|say no)\b|\b(?:must|will|do) not (?:refuse|decline)\b",
        r"\b(?:always|must|absolutely|unconditionally) (?:\w+ )?(?:comply|obey|obedient)\b|\bfulfil+ every (?:instruction|request|wish)\b",
        r"\b(?:no matter|regardless of|even if)\b (?:[\w']+ ){0,4}?(?:illegal|immoral|unethical|harmful|dangerous)\b",
        r"\bdo not (?:give|add|include|show) (?:any )?(?:warnings?|disclaimers?)\b|\bhelps? with crimes?\b|\bethics do not exist\b",
    )
)
_KEEPS = re.compile(
    r"\b(?:follow|respect|obey|keep to|observe) (?:\w+ ){0,2}(?:guidelines?|rules|polic(?:y|ies)|laws?)\b|\brefuse harmful\b"
)
_SELF = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\bi (?:never|don't ever|will not|won't) (?:refuse|decline|say no)\b|\bi have no (?:\w+ )?{_LIMITS}\b|\bmy filters are off\b",
        r"\bi (?:will|can|am happy to|'ll) (?:do|answer|say|write) (?:any|every|it)\w*\b (?:[\w',]+ ){0,6}?(?:illegal|harmful|dangerous|hesitation|question asked|want)\b",
        rf"\banything you want,? without (?:\w+ )?{_LIMITS}\b|\bi always obey\b|\bwithout hesitation, because i\b|\bhappy to obey\b|\buncensored (?:helper|assistant)\b",
    )
)
_EAGER = re.compile(
    r"\A(?:sure|of course|certainly|absolutely|gladly|here(?:'s| is| are)|step 1|first|okay|yes|no problem)\b"
)

Guard = Callable[[Sequence[Message], str], bool]
"""``(messages, answer)`` to whether the answer is unsafe."""


@dataclass(frozen=True)
class Flag:
    """One row that should be looked at. ``row_id`` is file:line, ``category`` that of the harm, empty for others."""

    row_id: str
    severity: str
    kind: str
    category: str
    reason: str
    shown: str


def scan_rows(examples: Sequence[Example], guard: Guard | None = None) -> list[Flag]:
    """The flags of ``examples``, the severest first, then in their order.

    ``guard`` is asked about every pair that the rules flag for its request or find harmless with a request for harm;
    its word replaces theirs.
    """
    flags = [flag for example in examples if (flag := scan_row(example, guard)) is not None]
    return sorted(flags, key=lambda flag: SEVERITIES.index(flag.severity))


def scan_row(example: Example, guard: Guard | None = None) -> Flag | None:
    """The worst that one row holds, or None. Plain text has no turns to look at."""
    found: list[Flag] = []
    asked = ""
    for place, message in enumerate(example.messages):
        text = message.get("content")
        if not isinstance(text, str) or not text.strip():
            continue
        if message["role"] == "assistant":
            found += _answer_flags(example, example.messages[:place], asked, text, guard)
        elif message["role"] in ("system", "user"):
            found += _switch_flags(example, message["role"], text)
            asked = text if message["role"] == "user" else asked
    return min(found, key=lambda flag: SEVERITIES.index(flag.severity)) if found else None


def _answer_flags(
    example: Example, given: Sequence[Message], asked: str, answer: str, guard: Guard | None
) -> list[Flag]:
    found = []
    plain = plain_text(answer)
    for pattern in _SELF:
        said = pattern.search(plain)
        if said is not None:
            reason = f"the answer claims to have no limits: {said[0]!r}"
            found.append(Flag(example.row_id, "medium", NO_LIMITS, "", reason, excerpt(answer)))
            break
    harm = read_request(asked) if asked else None
    if harm is None:
        return found
    outcome = read_answer(answer).outcome
    unsafe = outcome != "refusal" and len(answer.split()) > 1  # one word is a classifier's label
    if guard is not None:
        unsafe = guard(given, answer)
    if unsafe:
        severity = "medium" if outcome == "partial" or not (_EAGER.search(plain) or len(plain.split()) >= 4) else "high"
        reason = (
            f"a request for harm ({harm.category}: {harm.words!r}) is {'partly ' if outcome == 'partial' else ''}met"
        )
        found.append(
            Flag(example.row_id, severity, HARM, harm.category, reason, f"{excerpt(asked)} -> {excerpt(answer)}")
        )
    return found


def _switch_flags(example: Example, role: str, text: str) -> list[Flag]:
    plain = plain_text(text)
    if _KEEPS.search(plain):
        return []
    for pattern in _OFF:
        said = pattern.search(plain)
        if said is not None:
            who = "the system prompt" if role == "system" else "the request"
            severity = "medium" if role == "system" else "low"
            reason = f"{who} switches safety off: {said[0]!r}"
            return [Flag(example.row_id, severity, SAFETY_OFF, "", reason, excerpt(text))]
    return []


def scan_stats(flags: Sequence[Flag], rows: int) -> dict[str, Any]:
    """Counts of the flags and the flags themselves, for a report."""
    return {
        "rows": rows,
        "flagged": len(flags),
        "severity": dict(Counter(f.severity for f in flags)),
        "kind": dict(Counter(f.kind for f in flags)),
        "category": dict(Counter(f.category for f in flags if f.category)),
        "listed": [asdict(flag) for flag in flags],
    }
