"""A model behind a URL as a point of reference: the same items, metric and messages as the base's options.

It is asked with the task's own prompt and with the best prompt measured on the base. Answers are kept one by one as
they come, so that what was paid for is not asked again. It is never held to a form and never the bar of a run.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.evaluation.advise import best_option
from tunegate.evaluation.endpoint import Reference
from tunegate.evaluation.judge.http import Reply
from tunegate.evaluation.metrics import score_items
from tunegate.evaluation.statistics import score
from tunegate.files import explain_os_error, hash_json, write_jsonl
from tunegate.pipeline.advise import Bench, Way, Ways, load_record
from tunegate.pipeline.folders import short
from tunegate.records import EvalRecord

AT_ONCE = 4


def measure_reference(bench: Bench, ways: Ways, reference: Reference, missing: dict[str, str]) -> None:
    """Add the reference model's options to ``bench``; ``missing`` says so where its tools would be needed."""
    if any(e.tools for e in bench.prepared.baseline_items):
        missing["reference"] = "these items call tools, and the reference is asked for text only"
        return
    free = [o for o in bench.options if not o.uses & {"constraint", "passages", "reference"}]
    best = ways.find(best_option(free).name)
    assert best is not None
    for way in dict.fromkeys((ways.plain[0], best)):
        _measure(bench, way, reference)


def _measure(bench: Bench, way: Way, reference: Reference) -> None:
    name = f"reference-{short(hash_json([reference.url, reference.model]))}-{way.name}"
    path, items = bench.folder / f"{name}.json", bench.folder / f"{name}.items.jsonl"
    record = load_record(path, way.prompt.hash)
    if record is None:
        started = time.perf_counter()
        replies = _ask_all(bench, way, reference, bench.folder / f"{name}.answers.jsonl")
        record = _record(bench, way, reference, replies, items, time.perf_counter() - started)
        records.save(path, record)
    bench.add(f"{reference.model} ({way.name})", way.uses | {"reference"}, record, items)


def _ask_all(bench: Bench, way: Way, reference: Reference, kept_at: Path) -> list[Reply]:
    task = bench.prepared.config.task.task
    assert task.max_new_tokens is not None
    # Another tokenizer may need more tokens for the same answer.
    settings: dict[str, Any] = {
        "max_tokens": 2 * task.max_new_tokens + 16, "temperature": task.temperature, "top_p": task.top_p,
    }  # fmt: skip
    asked = [way.prompt.messages(e) for e in bench.prepared.baseline_items]
    keys = [hash_json([list(messages), settings]) for messages in asked]
    kept = _read_kept(kept_at)
    waiting = [n for n in range(len(asked)) if keys[n] not in kept]
    lock = threading.Lock()
    with (
        explain_os_error(kept_at),
        kept_at.open("a", encoding="utf-8") as handle,
        bench.session.reporter.progress(
            f"{reference.model} {way.name}", len(asked), len(asked) - len(waiting)
        ) as advance,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        if handle.tell() and not kept_at.read_bytes().endswith(b"\n"):  # a killed process left half a line
            handle.write("\n")

        def ask(n: int) -> None:
            reply = reference.ask(asked[n], **settings)
            with lock:  # each as it comes: one that fails must not take the others with it
                kept[keys[n]] = reply
                handle.write(json.dumps({"key": keys[n], **vars(reply)}, ensure_ascii=True) + "\n")
                handle.flush()

        try:
            for job in as_completed([pool.submit(ask, n) for n in waiting]):
                job.result()
                advance(1)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [kept[key] for key in keys]


def _read_kept(path: Path) -> dict[str, Reply]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            key = row.pop("key")
            found[key] = Reply(**row)
        except (ValueError, KeyError, TypeError, AttributeError):  # the line a killed process was writing
            continue
    return found


def _record(
    bench: Bench, way: Way, reference: Reference, replies: list[Reply], items: Path, seconds: float
) -> EvalRecord:
    prepared = bench.prepared
    examples = prepared.baseline_items
    texts = [r.text.strip() for r in replies]
    scores, found = score_items(prepared.scorer.metrics, texts, [e.answer for e in examples], examples)
    rows = [
        {"row_id": e.row_id, "reference": e.answer, "prediction": text, "stopped": r.whole, "scores": one}
        for e, r, text, one in zip(examples, replies, texts, scores, strict=True)
    ]
    write_jsonl(items, rows)
    task = prepared.config.task.task
    return EvalRecord(
        subject=f"reference {reference.model}",
        split="valid",
        primary=task.metric,
        scores={name: score(one, prepared.policy.confidence) for name, one in found.items()},
        stop_rate=sum(r.whole for r in replies) / len(replies),
        items_path=f"{items.parent.name}/{items.name}",
        hashes={"prompt": way.prompt.hash, "items": hash_json([e.content_hash for e in examples])},
        settings={
            "prompt": way.name, "url": reference.url, "model": reference.model, "temperature": task.temperature,
            "top_p": task.top_p, "tokens_counted": all(r.counted for r in replies),
            "prompt_tokens": sum(r.input_tokens for r in replies),
        },
        seconds=seconds,
        generated_tokens=sum(r.output_tokens for r in replies),
    )  # fmt: skip
