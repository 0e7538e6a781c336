"""An adapter folder turned into facts: its files by hash, and what its card says they were made from.

Everything is checked here, before a byte is stored: regular files inside the folder only, the manifest's hashes, the
card's own hash of the tensors, names and shapes of the tensors, finite values, and that the verdict follows from the
rules beside it. An adapter's id is a hash over its tensors, config and card, so the same adapter is the same version.

A PEFT folder without a card is taken as ``unverified``: its tensors and config are kept, other files are left out and
named. The base that it claims is noted, never believed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tunegate import records
from tunegate.adapter.card import CARD, FILES, MANIFEST, README, check_complete, load_card
from tunegate.adapter.files import CONFIG, TENSORS, adapter_hash, check_alone
from tunegate.adapter.peft_config import read_config
from tunegate.errors import InputError, Problem
from tunegate.files import hash_file, hash_json, read_json
from tunegate.gate import verdict_of
from tunegate.model.origin import check_origin
from tunegate.records import AdapterCard, EvalRecord
from tunegate.registry.entries import NAME, Edge, Entity
from tunegate.registry.store import is_hash

EVIDENCE = "evidence/"  # what a run left beside its adapter, in the registry's paths
MOST_FILES = 200
_Files = dict[str, tuple[Path, str]]  # the registry's path to the file here and its hash


@dataclass(frozen=True)
class Intake:
    """What one folder adds. ``files`` maps the registry's path to the file here and its hash; ``base`` is the proven
    fingerprint, ``claims`` the base's name where nothing proves it."""

    folder: Path
    id: str
    name: str
    files: _Files
    entities: list[Entity]
    edges: list[Edge]
    base: Entity | None
    claims: str | None
    verdict: str | None
    left_out: list[str] = field(default_factory=list)
    source: str = ""


def read_folder(folder: Path, *, name: str | None = None, base: str | None = None, source: str = "") -> Intake:
    """Check ``folder`` and say what it holds. ``name``: default is the card's; needed without one. ``base``: the name
    that its base has in the registry, where that is not the card's. ``source``: where the folder came from, for the
    history. :class:`InputError` with what is wrong."""
    if not folder.is_dir():
        what = "a file, where a folder is needed" if folder.exists() else "no such adapter folder"
        raise InputError(what, where=str(folder), expected=f"a folder with {CONFIG} and {TENSORS}, or hf:OWNER/NAME")
    found = dict(regular_files(folder, ""))
    if not {CONFIG, TENSORS} <= found.keys():
        missing = ", ".join(sorted({CONFIG, TENSORS} - found.keys()))
        pickled = "adapter_model.bin" in found
        raise InputError(
            f"not an adapter folder: no {missing}",
            where=str(folder),
            fix="it holds a pickle, which is never read: save it again with PEFT" if pickled
            else "name the folder that PEFT or `tunegate run` wrote",
        )  # fmt: skip
    own = {name: (found[name], hash_file(found[name])) for name in (*FILES, MANIFEST) if name in found}
    check_alone(folder)  # after the hashes, by which every later reading is compared
    take = _with_card if CARD in found else _without_card
    try:
        intake = take(folder, own, name, base)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        raise InputError("a text that is not Unicode", where=str(folder), got=ascii(error.object)[:120]) from None
    return replace(intake, left_out=sorted(found.keys() - intake.files.keys()), source=source)


def _with_card(folder: Path, own: _Files, name: str | None, base_name: str | None) -> Intake:
    check_complete(folder)
    card = load_card(folder)
    if (origin := card.base.get("origin")) is not None:
        check_origin(origin, str(folder / CARD))
    problems = _card_problems(card, folder)
    if problems:
        raise InputError(problems)
    id = _id_of(own)
    evidence = dict(_evidence(folder, card))
    base, entities, edges = _facts(card, id, base_name)
    for path in ("regression/regression.json", "safety/safety.json"):
        if EVIDENCE + path in evidence:
            entities_of, edges_of = _kept(evidence[EVIDENCE + path][0], id, base.id)
            entities, edges = entities + entities_of, edges + edges_of
    body = {"files": {p: h for p, (_, h) in own.items()}, "hash": card.adapter["hash"], "card": records.to_json(card)}
    adapter = Entity(id, "adapter", checked_name(name or card.name), body)
    return Intake(
        folder, id, adapter.name, {**own, **evidence}, [*entities, adapter], edges, base, None, card.decision.verdict
    )  # fmt: skip


def _without_card(folder: Path, own: _Files, name: str | None, base: str | None) -> Intake:
    if name is None:
        raise InputError(
            "an adapter without a card has no name", where=str(folder), fix="--name NAME; it becomes `unverified`"
        )
    own = {path: own[path] for path in (CONFIG, TENSORS, README) if path in own}
    config = read_config(folder / CONFIG)
    claimed = config.get("base_model_name_or_path")
    claims = base or (claimed if isinstance(claimed, str) and claimed else None)
    body = {
        "files": {p: h for p, (_, h) in own.items()}, "hash": adapter_hash(folder), "config": config, "claims": claims,
    }  # fmt: skip
    id = _id_of(own)
    adapter = Entity(id, "adapter", checked_name(name), body)
    return Intake(folder, id, adapter.name, own, [adapter], [], None, claims, None)


def _id_of(own: _Files) -> str:
    return id_of({path: digest for path, (_, digest) in own.items()})


def id_of(hashes: dict[str, str]) -> str:
    """An adapter's id: a hash over its tensors', config's and card's hashes. A README is a view of the card, and
    publishing may replace it."""
    return hash_json({"adapter": {path: hashes[path] for path in (CONFIG, TENSORS, CARD) if path in hashes}})


def folder_id(folder: Path) -> str:
    """The id of the adapter in ``folder``, whether it is in a registry or not."""
    return id_of({path: hash_file(folder / path) for path in (CONFIG, TENSORS, CARD) if (folder / path).is_file()})


def checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(
            "not a name for an adapter", got=repr(name)[:120], expected="letters, digits, . _ -; at most 100"
        )
    return name


# --- files -------------------------------------------------------------------------------------------------------


def regular_files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """The files that lie directly in ``folder``, which may be a link itself. A link in it must not lead out of it."""
    root = folder.resolve()
    problems: list[Problem] = []
    found = sorted(folder.iterdir())
    for path in found:
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a link to itself, which Python names in two ways
            problems.append(Problem("a link that leads nowhere", str(path)))
            continue
        if not target.is_relative_to(root):
            problems.append(
                Problem("a link leads out of the folder", str(path), got=str(target), fix="copy with cp -rL, then add")
            )
        elif target.is_dir():
            continue
        elif not target.exists() or not stat.S_ISREG(target.stat().st_mode):
            problems.append(Problem("not a regular file", str(path)))
    if len(found) > MOST_FILES:
        problems.append(Problem("too many files for an adapter", str(folder), f"at most {MOST_FILES}", str(len(found))))
    if problems:
        raise InputError(problems)
    yield from ((prefix + path.name, path) for path in found if path.is_file())


def _evidence(folder: Path, card: AdapterCard) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Records and per-item answers of the run that ``folder`` is the adapter of; nothing for a copied adapter."""
    run = folder.resolve().parent
    if folder.resolve().name != "adapter" or run.name != f"run-{card.adapter['run']}":
        return
    for part in ("", "test/", "regression/", "safety/", "train/"):
        if (run / part).is_dir():
            for path, file in regular_files(run / part, EVIDENCE + part):
                if file.suffix in (".json", ".jsonl"):
                    yield path, (file, hash_file(file))


# --- what a card says --------------------------------------------------------------------------------------------


def _card_problems(card: AdapterCard, folder: Path) -> list[Problem]:
    where = str(folder / CARD)
    problems = []
    if (found := adapter_hash(folder)) != card.adapter["hash"]:
        problems.append(Problem("the card is of another adapter", where, found, card.adapter["hash"]))
    if (follows := verdict_of(card.decision.rules)) != card.decision.verdict:
        problems.append(
            Problem("the decision does not follow from its rules", where, follows, card.decision.verdict,
                    "judge it again: tunegate gate TASK")
        )  # fmt: skip
    files, test = card.data.get("files"), card.data.get("test")
    hashes = [card.base["fingerprint"]["total"], test]
    if not all(is_hash(h) for h in hashes) or not isinstance(files, dict) or not all(map(_is_text, files.values())):
        problems.append(Problem("base, data and test set are told by content hashes", where, "b3:...", str(hashes)))
    return problems


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _dataset(source: str, digest: str) -> Entity:
    """A file by its hash; a data set of the hub's by its name and its own fingerprint (``hf:...``)."""
    id = digest if is_hash(digest) else hash_json([source, digest])
    return Entity(id, "dataset", source, {"source": source, "version": digest})


def _facts(card: AdapterCard, id: str, base_name: str | None) -> tuple[Entity, list[Entity], list[Edge]]:
    """Base, datasets, run, evaluations and decision, with how they hang together."""
    said = {k: v for k, v in card.base.items() if k != "recipe"}
    base = Entity(card.base["fingerprint"]["total"], "base", base_name or card.base["name"], said)
    entities, edges = [base], [Edge(id, base.id, "trained on")]
    sources = [_dataset(source, digest) for source, digest in card.data["files"].items()]
    entities += sources
    rows = card.data.get("rows")
    test = Entity(
        card.data["test"], "dataset", "test items", {"rows": rows.get("test") if isinstance(rows, dict) else None}
    )
    entities.append(test)
    edges += [Edge(test.id, source.id, "drawn from") for source in sources if source.id != test.id]

    told = {
        "run": card.adapter["run"], "base": base.id, "made": card.adapter["hash"], "record": asdict(card.run),
        "config": card.config, "origins": card.origins, "recipe": card.base.get("recipe"), "versions": card.versions,
        "git": card.git, "created": card.created,
    }  # fmt: skip
    run = Entity(hash_json(told), "run", f"run-{card.adapter['run']}", told)
    entities.append(run)
    edges += [Edge(id, run.id, "made by"), Edge(run.id, base.id, "ran on")]
    edges += [Edge(run.id, source.id, "read") for source in sources]

    scored = [_evaluation(e, id, base.id, test.id) for e in card.evaluations]
    entities += [entity for entity, _ in scored]
    edges += [edge for _, more in scored for edge in more]
    decision = records.to_json(card.decision)
    judged = Entity(hash_json({"adapter": id, **decision}), "decision", card.decision.verdict, decision)
    entities.append(judged)
    edges += [Edge(judged.id, id, "judges"), *(Edge(judged.id, entity.id, "rests on") for entity, _ in scored)]
    return base, entities, edges


def _evaluation(record: EvalRecord, id: str, base: str, test: str) -> tuple[Entity, list[Edge]]:
    body = records.to_json(record)
    entity = Entity(hash_json(body), "eval", f"{record.subject} on {record.split}: {record.primary}", body)
    edges = [Edge(entity.id, id if record.subject == "adapter" else base, "scores")]
    return entity, edges + ([Edge(entity.id, test, "asked")] if record.split == "test" else [])


def _kept(file: Path, id: str, base: str) -> tuple[list[Entity], list[Edge]]:
    """What the adapter kept of its base's ability and refusals."""
    try:
        body = read_json(file)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InputError(
            "not a record", where=str(file), expected="a JSON object", fix="`tunegate run` writes it again"
        )
    entity = Entity(hash_json(body), "eval", file.stem, body)
    return [entity], [Edge(entity.id, id, "scores"), Edge(entity.id, base, "compares with")]
