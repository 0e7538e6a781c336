"""Train a registered adapter again from its card, in a folder of its own, and compare the bytes.

Everything that goes in is checked before the first step: base, quantization, template, data and test items by their
hashes. The run is a normal one, with its own ledger, in a folder that holds nothing else: a finished run that lay there
would be taken for the new one. One that was cut off goes on. Equal code on an equal machine gives equal bytes; where
they differ, the largest difference of a value and the versions that changed are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunegate.adapter.card import load_card
from tunegate.adapter.files import TENSORS
from tunegate.config import Config, Task, freeze
from tunegate.errors import InputError, Problem
from tunegate.files import hash_file, read_json, write_json
from tunegate.pipeline.card import versions
from tunegate.pipeline.prepare import prepare
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.run import run
from tunegate.records import AdapterCard
from tunegate.registry.entries import read_entity, refuse_flagged, resolve
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import materialize, parts_of, recorded

Pairs = dict[str, tuple[Any, Any]]
BEGUN = "reproduce.json"


@dataclass(frozen=True)
class Reproduced:
    """``same``: the tensors' file is equal byte for byte. ``largest``: difference of two values, infinite where names
    or shapes differ. ``scores`` and ``versions``: then and now, versions only where they changed."""

    ref: str
    adapter: str
    same: bool
    largest: float
    scores: Pairs
    versions: Pairs


def reproduce(
    registry: Registry, reference: str, out: Path, reporter: Reporter, *, folder: Path | None, stop: Callable[[], bool]
) -> Reproduced:
    """Run ``reference`` again below ``out``. ``folder``: where the card's relative paths start; default: recorded."""
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
        parts = parts_of(connection, version.adapter)
        carded = read_entity(connection, version.adapter).body.get("card") is not None
    refuse_flagged(version, "trained again")
    if not carded:
        raise InputError("an unverified adapter has no card to train it from", where=version.ref)
    there = materialize(registry, version.adapter)
    card = load_card(there)
    if card.run.steps == 0:
        raise InputError("the adapter was imported and evaluated, not trained here", where=version.ref)
    config = _config(card, folder or _recorded(registry, parts), out)
    begun_for = {"adapter": version.adapter}
    _check_free(out, begun_for)
    _check_inputs(card, config, reporter)
    write_json(out / BEGUN, begun_for)
    outcome = run(config, reporter, stop=stop)
    one, two = there / TENSORS, outcome.adapter / TENSORS
    same = hash_file(one) == hash_file(two)
    then, now = card.versions, versions()
    return Reproduced(
        ref=version.ref,
        adapter=str(outcome.adapter),
        same=same,
        largest=0.0 if same else _largest(one, two),
        scores={k: (v, _scores(outcome.card).get(k)) for k, v in _scores(card).items()},
        versions={k: (then.get(k), now.get(k)) for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)},
    )


def _check_free(out: Path, begun_for: dict[str, str]) -> None:
    """:class:`InputError` unless ``out`` is free or was begun for this adapter."""
    there = sorted(out.iterdir()) if out.is_dir() else []
    if there and not ((out / BEGUN).is_file() and read_json(out / BEGUN) == begun_for):
        raise InputError(
            "the folder holds something else", where=str(out), got=", ".join(p.name for p in there[:5]),
            fix="name a new folder: a run that is there would not be trained again",
        )  # fmt: skip


def _recorded(registry: Registry, parts: Mapping[str, Sequence[str]]) -> Path:
    """The task's folder, as the run noted it."""
    if (found := recorded(registry, parts)) is None:
        fix = "--folder FOLDER: the task file's folder"
        raise InputError("the registry does not know where the task's data lies", fix=fix)
    return Path(found)


def _config(card: AdapterCard, folder: Path, out: Path) -> Config:
    settings = {**card.config, "output": str(out.absolute()), "registry": None}
    try:
        task = Task.model_validate(freeze(settings))
    except ValidationError as error:
        raise InputError("the card's settings are not those of this tunegate", got=str(error)) from None
    return Config(task, folder.absolute(), dict(card.origins))


def _check_inputs(card: AdapterCard, config: Config, reporter: Reporter) -> None:
    """:class:`InputError` unless everything that the card names by a hash is what it was."""
    problems = [
        Problem("the data has changed", str(config.path(source)), digest, hash_file(path))
        for source, digest in card.data["files"].items()
        if (path := config.path(source)).is_file() and hash_file(path) != digest
    ]
    if problems:
        raise InputError(problems)
    prepared = prepare(config, reporter)
    base = prepared.base
    pairs: Pairs = {
        "base": (card.base["fingerprint"]["total"], base.fingerprint.total),
        "quantization": (card.base.get("recipe"), base.recipe),
        "chat template": (card.template.get("hash"), base.renderer.template_hash),
        "data": (card.data["files"], prepared.data.files),
        "test items": (card.data["test"], prepared.test_hash),
    }
    problems = [Problem(f"another {k}", "the card", str(a), str(b)) for k, (a, b) in pairs.items() if a != b]
    if problems:
        raise InputError(problems)


def _scores(card: AdapterCard) -> dict[str, float]:
    return {f"{e.subject} {name}": score.value for e in card.evaluations for name, score in e.scores.items()}


def _largest(one: Path, two: Path) -> float:
    from safetensors.torch import load_file

    then, now = load_file(one), load_file(two)
    if {k: v.shape for k, v in then.items()} != {k: v.shape for k, v in now.items()}:
        return float("inf")
    return max(float((then[k].float() - now[k].float()).abs().max()) for k in then)
