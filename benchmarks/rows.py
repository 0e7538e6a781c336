"""The rows every contestant trains on: a file's, or made here to the length profile of a task.

Rows are rendered once, by tunegate's renderer, and handed to every contestant as token ids with a target mask, so
nobody's template or tokenizer differs. Made rows are random words: they cost what real ones of their length cost,
and nothing is learned from them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "Classify the customer's banking question into one of the known intents. Answer with the intent name only."
_TEXT = (
    "my card is not working the payment was declined why can I see a charge that do recognise please help with "
    "transfer to another account how long does it take when will refund arrive top up failed today yesterday bank "
    "app phone lost stolen cash machine withdrawal exchange rate fee currency abroad identity verify pin change"
)
WORDS = tuple(_TEXT.split())
INTENTS = ("card_payment_failed", "refund_not_showing_up", "lost_or_stolen_card", "exchange_rate", "top_up_failed")


@dataclass(frozen=True)
class Profile:
    """Lengths in tokens: the user's words are log-normal around ``user``; the answer has about ``answer``."""

    system: str
    user: int
    sigma: float
    answer: int


PROFILES = {
    "intent": Profile(SYSTEM, 35, 0.45, 5),
    "json": Profile("Return the order as one JSON object with the fields asked for, and nothing else.", 90, 0.4, 60),
    "chat": Profile("You are a helpful assistant.", 120, 0.8, 180),
}


def renderer(base: Path) -> Any:
    from tunegate.data.render import Renderer
    from tunegate.model.loading import load_tokenizer

    return Renderer(load_tokenizer(base))


def made_messages(profile: Profile, n: int, tokenizer: Any, seed: int) -> list[list[dict[str, str]]]:
    rng = random.Random(f"{profile}/{seed}")

    def text(tokens: int) -> str:
        words: list[str] = []
        while len(words) < tokens:  # these words are one token each, or close to it
            words.append(rng.choice(WORDS))
        ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"][:tokens]
        return str(tokenizer.decode(ids))

    rows = []
    for _ in range(n):
        user = min(max(4, round(profile.user * rng.lognormvariate(0.0, profile.sigma))), 1500)
        answer = rng.choice(INTENTS) if profile.answer < 10 else text(profile.answer)
        rows.append(
            [
                {"role": "system", "content": profile.system},
                {"role": "user", "content": text(user)},
                {"role": "assistant", "content": answer},
            ]
        )
    return rows


def rendered(base: Path, *, data: Path | None, profile: str, n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` rows of ``data``, shuffled, or made to ``profile``, each ``{"ids": [...], "target": [...]}``."""
    from tunegate.data.types import Example, Rendered

    render = renderer(base)
    if data is not None:
        from tunegate.data.forms import load_examples

        loaded = load_examples((str(data),), base_dir=Path.cwd())
        examples = list(loaded.examples)
        random.Random(seed).shuffle(examples)
        examples = examples[:n]
    else:
        chats = made_messages(PROFILES[profile], n, render.tokenizer, seed)
        examples = [Example("made", line, tuple(messages)) for line, messages in enumerate(chats, 1)]
    rows = [row for row in render.render_many(examples) if isinstance(row, Rendered) and row.n_targets]
    return [{"ids": list(row.ids), "target": [int(t) for t in row.target]} for row in rows]


def of_length(length: int, n: int, seed: int, vocabulary: int = 40_000) -> list[dict[str, Any]]:
    """``n`` rows of exactly ``length`` random tokens, the last eighth of them targets."""
    rng = random.Random(f"{length}/{seed}")
    targets = max(4, length // 8)
    return [
        {
            "ids": [rng.randrange(100, vocabulary) for _ in range(length)],
            "target": [0] * (length - targets) + [1] * targets,
        }
        for _ in range(n)
    ]


def save(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def describe(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = sorted(len(row["ids"]) for row in rows)
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "targets": sum(sum(row["target"][1:]) for row in rows),
        "length_median": lengths[len(lengths) // 2],
        "length_max": lengths[-1],
    }
