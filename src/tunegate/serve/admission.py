"""What must hold before an adapter answers, all of it told together.

From the card: the base's fingerprint and quantization are the served ones, the gate says ship (or somebody overrode it,
and the registry keeps why), the golden prompts render to the same tokens with the template of the training, and no base
it was made from is flagged. From the files: every byte is the published one, and the tensors are exactly those of the
modules that the config selects. What shares a batch with other adapters cannot change the head,
the embeddings or whole weights: such an adapter is refused with the way out.

An adapter without a card, or one that the gate held, is admitted only where that was allowed, and its standing says so.
There is no way around another base. Whoever asks says how weights are hashed: the engine reads and hashes them in one
go while everything else is looked at here, so that what was hashed is what answers.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from tunegate.adapter.card import (
    CARD,
    CHANGED,
    base_problems,
    load_card,
    manifest_problems,
    template_of,
)
from tunegate.adapter.files import CONFIG, TENSORS, adapter_hash
from tunegate.errors import InputError, Problem, collecting
from tunegate.files import hash_file, read_json
from tunegate.gate import SHIP, verdict_of
from tunegate.records import AdapterCard
from tunegate.registry.bases import check_base
from tunegate.registry.entries import RETIRED, Version, list_versions, refuse_flagged
from tunegate.registry.intake import id_of, regular_files
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import PROVENANCE
from tunegate.registry.tables import versions
from tunegate.serve.base import ServedBase

UNVERIFIED = "unverified"  # standing of an adapter that has no card
_PEFT_MERGE = "merge it into its base (PEFT: merge_and_unload, then save_pretrained) and serve that folder as a base"
_WHOLE = ("modules_to_save", "bias", "lora_bias", "trainable_token_indices")  # keys of the config: more than a LoRA

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Admitted:
    """An adapter that may answer. ``key``: its content hash; ``template``: of its training; ``version``: its id in the
    registry, where it is known there; ``created``: Unix time; ``stamp``: see :func:`stamp_of`."""

    key: str
    folder: Path
    template: str | None
    standing: str
    created: int
    version: str | None
    stamp: Stamp


@dataclass(frozen=True)
class House:
    """What a server admits adapters to. ``registry``: where flags and overrides are looked up, None for nowhere."""

    base: ServedBase
    registry: Registry | None = None
    allow_ungated: bool = False


def stamp_of(folder: Path) -> Stamp | None:
    """Size, modification time and inode of the adapter's files: while it stays, they are those that were admitted.
    None if one is gone."""
    try:
        found = [(folder / name).stat() for name in (CONFIG, TENSORS)]
    except OSError:
        return None
    return tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in found)


Identify = Callable[[Path], Callable[[], str]]
"""Begins to hash an adapter's content; what it gives waits for the hash (:class:`InputError` where there is none)."""


def identify_here(folder: Path) -> Callable[[], str]:
    """In this process, once the hash is asked for."""
    return partial(adapter_hash, folder)


def admit(
    folder: Path, house: House, version: Version | None = None, identify: Identify = identify_here
) -> Admitted:  # fmt: skip
    """The adapter in ``folder``; :class:`InputError` with everything that keeps it from answering. ``version``: what it
    is in the registry, where it came from there."""
    stamp = stamp_of(folder)
    if stamp is None:
        raise InputError(_not_an_adapter(folder))
    files = dict(regular_files(folder, ""))  # nothing else is opened
    digest = cache(hash_file)
    hashed = identify(folder)
    problems = module_problems(folder, house.base)
    fits = not problems
    card = None
    if CARD in files:
        problems += manifest_problems(folder, digest)
        with collecting(problems):
            card = load_card(folder)
    override = version.override if version else None
    if version is None:
        version, override = _known(house, files, digest, problems)
    standing, template = UNVERIFIED, None
    if card is not None or CARD not in files:  # a card that cannot be read is told above
        standing, more = standing_of(card, version, override, house, str(folder))
        problems += more
    if card is not None:
        template = template_of(card)
        with collecting(problems):
            problems += house.base.golden_problems(card)
    key = _key(folder, card, hashed, problems) if fits else ""  # tensors that fit are of the base's size
    if stamp_of(folder) != stamp:  # one thing was checked here, another there
        raise InputError("the adapter's files changed while they were checked", where=str(folder), fix="load it again")
    if problems:
        raise InputError(list(dict.fromkeys(map(_with_way_out, problems))))
    id = version.adapter if version else None
    return Admitted(key, folder, template, standing, _created(card, folder), id, stamp)


def _key(folder: Path, card: AdapterCard | None, hashed: Callable[[], str], problems: list[Problem]) -> str:
    """The hash of the tensors and of what the config means, which the card has to name."""
    key = ""
    with collecting(problems):
        key = hashed()
    if card is not None and key and card.adapter["hash"] != key:
        where = str(folder / CARD)
        problems.append(Problem("the card is of another adapter", where, key, card.adapter["hash"], CHANGED))
    return key


def _not_an_adapter(folder: Path) -> list[Problem]:
    if not folder.is_dir():
        return [Problem("no such adapter folder", str(folder))]
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    pickled = (folder / "adapter_model.bin").is_file()
    fix = "it holds a pickle, which is never read: save it again with PEFT" if pickled else "give an adapter's folder"
    return [Problem(f"not an adapter folder: no {', '.join(missing)}", str(folder), fix=fix)]


def _known(
    house: House, files: dict[str, Path], digest: Callable[[Path], str], problems: list[Problem]
) -> tuple[Version | None, str | None]:
    """A folder's version in the registry in use, and the override that counts: the registry's, else the one that
    `registry pull` wrote beside exactly these files."""
    if house.registry is None and PROVENANCE not in files:
        return None, None
    id = id_of({name: digest(files[name]) for name in (CONFIG, TENSORS, CARD) if name in files})
    if house.registry is not None:
        with house.registry.database.reading() as connection:
            version = next(iter(list_versions(connection, versions.c.adapter == id)), None)
        if version is None:
            with collecting(problems):
                check_base(house.registry, house.base.at_hand.fingerprint.total, "served")
        return version, version.override if version else None
    try:
        said = read_json(files[PROVENANCE])
    except (OSError, ValueError, RecursionError):
        said = None
    override = said.get("override") if isinstance(said, dict) and said.get("adapter") == id else None
    return None, override if isinstance(override, str) and override.strip() else None


def standing_of(
    card: AdapterCard | None, version: Version | None, override: str | None, house: House, where: str
) -> tuple[str, list[Problem]]:
    """How an adapter stands (``ship``, ``hold (override: why)``, ``hold (ungated)``, ``unverified``), and what the card
    and the registry say against it."""
    problems = [] if version is None else version_problems(version)
    if card is None:
        what = "the adapter has no card: nothing says what it was trained on, or how it scored"
        fix = "`tunegate registry evaluate` gives it one; --allow-ungated serves it as unverified"
        return UNVERIFIED, problems if house.allow_ungated else [*problems, Problem(what, where, fix=fix)]
    problems += base_problems(card, house.base.at_hand, where)
    verdict = card.decision.verdict
    if (follows := verdict_of(card.decision.rules)) != verdict:
        problems.append(Problem("the decision does not follow from its rules", where, follows, verdict))
    if verdict == SHIP:
        return SHIP, problems
    if override:
        return f"{verdict} (override: {override})", problems
    if not house.allow_ungated:
        unmet = "; ".join(f"{r.rule}: {r.reason}" for r in card.decision.rules if r.required and r.verdict != "pass")
        fix = "approve it with a reason (tunegate registry promote --override WHY), or serve it with --allow-ungated"
        problems.append(Problem(f"the gate says {verdict}", where, SHIP, unmet, fix))
    return f"{verdict} (ungated)", problems


def version_problems(version: Version) -> list[Problem]:
    """Why a version in the registry is not served: a base it was made from was superseded, or it was retired."""
    problems: list[Problem] = []
    with collecting(problems):
        refuse_flagged(version, "served")
    if version.state == RETIRED:
        problems.append(Problem("the version is retired", version.ref, fix="serve another one"))
    return problems


def module_problems(folder: Path, base: ServedBase) -> list[Problem]:
    """Tensors that are missing, too many or of another shape for ``base``, and what only a merge can serve."""
    try:
        modules = base.modules_of(folder)
    except InputError as error:
        return error.problems
    on_head = sorted(set(modules) & base.head)
    fix = "merge it into its base (tunegate merge) and serve that folder as a base"
    return [
        Problem("an adapter on the output head or embeddings is not served beside others", f"{folder}: {path}", fix=fix)
        for path in on_head
    ]


def _with_way_out(problem: Problem) -> Problem:
    """A LoRA that carries whole weights can be merged by PEFT, and then be served."""
    key = problem.where.rpartition(": ")[2]
    whole = key in _WHOLE or "lora_embedding_" in key or "trainable_tokens" in key
    full = problem.what == "no adapted module takes this tensor" and ".lora_" not in key
    return replace(problem, fix=_PEFT_MERGE) if whole or full else problem


def _created(card: AdapterCard | None, folder: Path) -> int:
    if card is not None:
        try:
            return int(datetime.datetime.fromisoformat(card.created).timestamp())
        except (ValueError, OverflowError, OSError):
            pass
    return int((folder / TENSORS).stat().st_mtime)
