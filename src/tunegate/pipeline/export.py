"""``export``: an adapter in another tool's format, read back and compared before it is published.

What a format is stands in ``formats``. Here everything that is wrong with the input is found first; then the adapter is
read on its base, the files grow in a ``.partial`` folder, the format's reader reads them, and ``parity`` compares the
two. Below the limits nothing is left. The card travels along, and a report says where the files came from and what the
hash of each is.

It exports one adapter: several are merged first.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunegate.adapter.files import adapter_hash, checked_state, module_paths
from tunegate.errors import InputError, Problem, TunegateError, nearest
from tunegate.export.gguf_file import OUT_TYPES
from tunegate.files import explain_os_error, flush_path, growing, hash_file, partial_of, write_json
from tunegate.model.loading import empty_model
from tunegate.pipeline import proof
from tunegate.pipeline.adapted import Source, check_folders, find_source, read_adapter
from tunegate.pipeline.card import CARD
from tunegate.pipeline.formats import (
    FORMATS,
    WITH_ONTO,
    WITH_OUTTYPE,
    ExportRequest,
    Format,
    Job,
    Reader,
    vllm_findings,
)
from tunegate.pipeline.proof import Answered, Proof
from tunegate.pipeline.reporter import Reporter

REPORT = "export.json"


def export(request: ExportRequest, reporter: Reporter) -> dict[str, Any]:
    """Export and publish; returns the report that lies in the folder as ``export.json``."""
    _check(request)
    source = find_source((request.adapter,), request.base, request.allow_base_mismatch, reporter, request.items)
    plain = empty_model(source.folder)
    _, state = checked_state(plain, request.adapter)  # everything wrong with it, before a weight is read
    folder, form = partial_of(request.out), FORMATS[request.to]
    modules = tuple(module_paths(state))
    job = Job(request, source, folder, reporter, _about(request, source), plain.config, modules, None)
    form.check(job)
    reader = _reader_of(form, job)
    with growing(request.out):
        return _export(job, form, reader)


def _export(job: Job, form: Format, reader: Reader) -> dict[str, Any]:
    request, folder = job.request, job.folder
    reference, job.model = read_adapter(job.source, request.adapter, job.reporter)
    try:
        with explain_os_error(request.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            form.write(job)
        job.reporter.line(f"reading the export with {reader.name} on the same prompts")
        answered = _read_back(reader, job, reference.answered)
        found = proof.compare(job.source.exam, reference.answered, answered, reference.plain)
        proof.require(found, request.limits, f"what {reader.name} reads", str(request.out))
        report = _report(job, reader.name, found)
        _publish(job, report)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return report


def check_for_vllm(adapter: Path, base: str | None, reporter: Reporter) -> list[dict[str, str]]:
    """What vLLM would make of the adapter as it is; nothing is written. It need not be one that tunegate can read."""
    source = find_source((adapter,), base, True, reporter)
    return [asdict(finding) for finding in vllm_findings(adapter, source)]


def _check(request: ExportRequest) -> None:
    check_folders((request.adapter,))
    problems = []
    if request.to not in FORMATS:
        fix = nearest(request.to, list(FORMATS))
        problems.append(Problem("unknown format", "--to", ", ".join(FORMATS), repr(request.to), fix))
    if request.outtype not in OUT_TYPES:
        problems.append(Problem("unknown number format", "--outtype", ", ".join(OUT_TYPES), repr(request.outtype)))
    if request.outtype != "f16" and request.to not in WITH_OUTTYPE:
        problems.append(Problem("no such choice in this format", "--outtype", ", ".join(WITH_OUTTYPE), request.to))
    if request.onto != "trained" and request.to not in WITH_ONTO:
        problems.append(Problem("nothing is merged in this format", "--onto", ", ".join(WITH_ONTO), request.to))
    if request.out.exists() or request.out.is_symlink():
        problems.append(Problem("the output exists", str(request.out), fix="name another folder, or remove it"))
    if partial_of(request.out).is_symlink():
        problems.append(Problem("a link stands where the output grows", str(partial_of(request.out)), fix="remove it"))
    if problems:
        raise InputError(problems)


def _about(request: ExportRequest, source: Source) -> dict[str, str]:
    """Where an export came from, as the keys of a GGUF file."""
    card = source.cards[0] if source.cards else None
    about = {
        "general.name": card.name if card else request.adapter.name,
        "tunegate.adapter.hash": adapter_hash(request.adapter),
        "tunegate.base.name": source.name,
        "tunegate.base.fingerprint": source.fingerprint,
    }
    return about | ({"tunegate.decision": card.decision.verdict} if card else {})


def _reader_of(form: Format, job: Job) -> Reader:
    wanted = job.request.reader
    usable = [r for r in form.readers if r.installed(job)]
    chosen = next((r for r in usable if wanted in (None, r.name)), None)
    if chosen is None:
        names = ", ".join(r.name for r in usable)
        raise InputError("this reader cannot be used here", where="--reader", expected=names, got=repr(wanted))
    return chosen


def _read_back(reader: Reader, job: Job, first: Answered) -> Answered:
    """What ``reader`` makes of the export; :class:`TunegateError` with its own words where it fails."""
    try:
        return proof.sit(job.source.exam, reader.read(job), first)
    except (TunegateError, OSError, MemoryError):
        raise
    except Exception as error:  # another library's reading of the base or the export can fail in any way
        raise TunegateError(
            f"{reader.name} cannot read the export",
            where=str(job.request.out),
            got=f"{type(error).__name__}: {error}"[:300],
            fix="does it know this base at all? --reader chooses another one",
        ) from error


def _report(job: Job, reader: str, found: Proof) -> dict[str, Any]:
    request, source = job.request, job.source
    return {
        "format": request.to,
        "outtype": request.outtype if request.to in WITH_OUTTYPE else None,
        "base": {"name": source.name, "fingerprint": source.fingerprint, "recipe": source.recipe},
        "onto": request.onto,
        "adapter": {"folder": request.adapter.name, "hash": job.about["tunegate.adapter.hash"]},
        "verified": source.verified,
        "base_mismatch_allowed": request.allow_base_mismatch,
        "modules": len(job.modules),
        "changed": job.changed,
        "reader": reader,
        **found.to_json(),
        "limits": asdict(request.limits),
        "notes": job.notes,
    }


def _publish(job: Job, report: dict[str, Any]) -> None:
    """The card and the report beside the files, then the folder under its name."""
    if (job.request.adapter / CARD).exists():
        shutil.copyfile(job.request.adapter / CARD, job.folder / CARD)
    files = sorted(p for p in job.folder.iterdir() if p.is_file())
    report["files"] = {p.name: hash_file(p) for p in files}
    with explain_os_error(job.request.out):
        for path in files:
            flush_path(path)
        write_json(job.folder / REPORT, report)
        job.folder.rename(job.request.out)
        flush_path(job.request.out.absolute().parent)
