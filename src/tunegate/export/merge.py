"""A merged checkpoint: the base's shards with ``W + delta`` in the place of every adapted matrix, all else as it was.

The output grows in a ``.partial`` folder beside its name: a finished shard is recorded there with its hash, so a merge
that was cut off goes on with the next shard. ``finish`` publishes the folder by a rename; the caller checks parity
before that. Every adapted tensor must have changed. Where the adapter was trained with a chat template of its own, the
merged folder carries that one.

It does not load the model or judge the result: ``parity`` does. Errors leave what they leave; ``keep_finished`` and
``discard`` clean up.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.errors import TunegateError
from tunegate.export.plan import Plan
from tunegate.export.stream import check_changed, merged_tensors
from tunegate.files import explain_os_error, flush_path, hash_file, read_json, write_bytes, write_json, write_text
from tunegate.model.origin import MERGE
from tunegate.model.shards import ShardWriter, size_of
from tunegate.model.weights import INDEX_FILE

PROGRESS = "merge-progress.json"
TEMPLATE = "chat_template.jinja"
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".md")
_NOT_COPIED = {INDEX_FILE, MERGE, "quantize_config.json"}  # an origin of the base's own stands in the report


@dataclass(frozen=True)
class Merged:
    """What a merge did. ``changed`` counts tensors that differ from the base's; ``modules`` those that should."""

    folder: Path
    changed: int
    modules: int
    bytes: int


def write_merged(plan: Plan, progress: Callable[[int], None] = lambda _: None, template: str | None = None) -> Merged:
    """Write every shard and the files beside them into ``plan.partial``; shards already there are kept.

    ``progress`` is called with the bytes of each tensor. ``template``: the chat template of training, None for the
    base's own. :class:`TunegateError` if an adapted tensor is unchanged or not finite; nothing is kept then, because
    the same merge would come out the same.
    """
    partial = plan.partial
    with explain_os_error(plan.out):
        partial.mkdir(parents=True, exist_ok=True)
        known = _known(plan)
        for source, entries in plan.files.items():
            if source.name in known["shards"]:
                progress(sum(map(size_of, entries)))
                continue
            known["shards"][source.name] = _write_shard(plan, source, partial / source.name, progress)
            write_json(partial / PROGRESS, known)
        _copy_rest(plan, template)
    changed = {name for shard in known["shards"].values() for name in shard["changed"]}
    try:
        check_changed(plan, changed, str(plan.out))
    except TunegateError:
        discard(plan)
        raise
    return Merged(partial, len(changed), len(plan.updates), sum(p.stat().st_size for p in plan.files))


def _known(plan: Plan) -> dict[str, Any]:
    """What an earlier attempt finished; nothing if it was another merge or a shard is damaged."""
    shards: dict[str, Any] = {}
    try:
        noted = _noted(plan)
        shards = {n: s for n, s in noted.items() if hash_file(plan.partial / Path(n).name) == s["hash"]}
    except (OSError, KeyError, TypeError):
        noted = {}
    if not noted:
        for leftover in plan.partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    return {"key": plan.key, "shards": shards}


def _noted(plan: Plan) -> dict[str, Any]:
    """The shards that an earlier attempt at this very merge noted as finished, by name."""
    try:
        found = read_json(plan.partial / PROGRESS)
        return dict(found["shards"]) if found["key"] == plan.key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_shard(plan: Plan, source: Path, target: Path, progress: Callable[[int], None]) -> dict[str, Any]:
    """The shard's hash and the names of the tensors that changed."""
    changed = []
    with ShardWriter(target, sorted(plan.files[source], key=lambda e: e.start)) as writer:
        try:
            for entry, data, differs in merged_tensors(plan, source):
                if differs:
                    changed.append(entry.name)
                writer.write(entry.name, data)
                del data  # else it would be held until the next one is ready
                progress(size_of(entry))
        except TunegateError:
            discard(plan)
            raise
    return {"hash": writer.hash, "changed": changed}


def _copy_rest(plan: Plan, template: str | None) -> None:
    """Config, tokenizer and templates; an index is written anew. Code is left behind."""
    for source in sorted(plan.base.iterdir()):
        wanted = source.suffix in _COPIED and source.name not in _NOT_COPIED
        if wanted and source.is_file() and source.resolve().suffix != ".py":
            write_bytes(plan.partial / source.name, source.read_bytes())
    if template is not None:
        write_text(plan.partial / TEMPLATE, template)
    if len(plan.files) > 1 or any(path.name != "model.safetensors" for path in plan.files):
        weight_map = {e.name: path.name for path, entries in plan.files.items() for e in entries}
        total = sum(size_of(e) for entries in plan.files.values() for e in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(plan.partial / INDEX_FILE, index)


def finish(plan: Plan, report: Mapping[str, Any]) -> Path:
    """Publish the folder under its name, with ``report`` inside."""
    with explain_os_error(plan.out):
        write_json(plan.partial / MERGE, dict(report))
        (plan.partial / PROGRESS).unlink(missing_ok=True)
        plan.partial.rename(plan.out)
        flush_path(plan.out.absolute().parent)
    return plan.out


def keep_finished(plan: Plan) -> int:
    """Remove what a merge that was cut off left half-written; returns how many shards are kept for the next time."""
    kept = _noted(plan)
    if not kept:
        discard(plan)
        return 0
    for path in plan.partial.iterdir():
        if path.name not in kept and path.name != PROGRESS:
            path.unlink()
    return len(kept)


def discard(plan: Plan) -> None:
    shutil.rmtree(plan.partial, ignore_errors=True)
