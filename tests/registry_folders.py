"""Adapter folders as `tunegate run` leaves them, made in milliseconds: real tensors, card and manifest, no training.

Also what runs in other processes in the tests of concurrency and of kills.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tunegate import records
from tunegate.adapter.card import FILES, MANIFEST
from tunegate.adapter.files import adapter_hash
from tunegate.files import hash_bytes, hash_file, hash_json, write_json, write_jsonl
from tunegate.model.fingerprint import BaseFingerprint
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord, RuleResult, RunRecord, Score

FORK = multiprocessing.get_context("fork")  # everything is imported already; every process opens its own connections
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def fingerprint(seed: int) -> BaseFingerprint:
    parts = {name: hash_json([seed, name]) for name in ("weights", "config", "tokenizer", "template")}
    return BaseFingerprint(**parts, total=hash_json(parts))


def tensors(seed: int, rank: int = 2, wide: int = 8) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    found = {}
    for module in MODULES:
        prefix = f"base_model.model.{module}"
        found[f"{prefix}.lora_A.weight"] = random.normal(size=(rank, wide)).astype(np.float32)
        found[f"{prefix}.lora_B.weight"] = random.normal(size=(wide, rank)).astype(np.float32)
    return found


def peft_folder(folder: Path, seed: int = 0, base: str = "tiny", **size: int) -> Path:
    """Tensors and config alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(seed, **size), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": size.get("rank", 2), "lora_alpha": 4, "bias": "none",
        "target_modules": ["q_proj", "up_proj"], "base_model_name_or_path": base,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def decision(verdict: str = "ship") -> Decision:
    rule = {"ship": "pass", "hold": "fail", "inconclusive": "inconclusive"}[verdict]
    rules = [RuleResult("min_score", rule, ">= 0.7", "0.8", "as it is", metric="score", value=0.8, threshold=0.7)]
    return Decision(verdict, rules, hash_json("policy"))


def card(
    digest: str, *, name: str = "support", base: int = 0, base_name: str = "tiny", verdict: str = "ship",
    score: float = 0.8, data: str = "rows", recipe: dict[str, Any] | None = None, run: str = "aaaaaaaaaa",
) -> AdapterCard:  # fmt: skip
    made = fingerprint(base)
    scores = {"accuracy": Score("accuracy", score, 20, score - 0.1, min(score + 0.1, 1.0))}
    test = hash_json(["test", data])

    def scored(subject: str) -> EvalRecord:
        hashes = {"base": made.total, "data": test, **({"adapter": digest} if subject == "adapter" else {})}
        return EvalRecord(
            subject, "test", "accuracy", scores, 1.0, f"test/{subject}.items.jsonl", hashes,
            {"prompt": "as_is"}, 1.5, 40,
        )  # fmt: skip

    return AdapterCard(
        name=name,
        base={
            "name": base_name, "source": "folder", "revision": None, "fingerprint": vars(made), "parameters": 1000,
            "recipe": recipe,
        },
        adapter={"hash": digest, "run": run},
        data={"files": {"rows.jsonl": hash_bytes(data.encode())}, "test": test, "rows": {"train": 80, "test": 20}},
        template={"hash": hash_json("template"), "golden": [{"text": "hi", "ids": [1, 2]}]},
        config={"train": {"rank": 2, "lr": 0.01, "seed": 0}, "base": {"name": base_name}},
        origins={"train.rank": "default"},
        run=RunRecord(
            "b3:config", "lora", 8, 2.0, 4, 0.8, 0.5, 0.6, False, 64, 1000, 900, 800, 300, 2.0, 450.0, 1 << 28,
            "cpu", "float32", "packed",
        ),
        evaluations=[scored("base"), scored("adapter")],
        comparisons=[Comparison("accuracy", "base", 0.5, 0.3, 0.7, 20, 0.001, 10, 0, 10)],
        decision=decision(verdict),
        test_openings=[],
        versions={"tunegate": "0.1.0", "torch": "2.13.0"},
        git=None,
        created="2026-01-02T03:04:05+00:00",
    )  # fmt: skip


def adapter_folder(folder: Path, seed: int = 0, **said: Any) -> Path:
    """A complete adapter folder; ``said`` goes to :func:`card`."""
    size = {key: said.pop(key) for key in ("rank", "wide") if key in said}
    peft_folder(folder, seed, said.get("base_name", "tiny"), **size)
    return write_card(folder, card(adapter_hash(folder), **said))


def write_card(folder: Path, said: AdapterCard) -> Path:
    records.save(folder / "card.json", said)
    (folder / "README.md").write_text(f"# {said.name}\n")
    write_json(folder / MANIFEST, {name: hash_file(folder / name) for name in FILES})
    return folder


def change_card(folder: Path, **fields: Any) -> Path:
    """The same folder with other words on its card, and a manifest that says so."""
    return write_card(folder, replace(records.load(folder / "card.json", AdapterCard), **fields))


def run_folder(root: Path, seed: int = 0, answers: tuple[str, ...] = ("red", "blue"), **said: Any) -> Path:
    """A run's folder with its adapter and the stored answers of the test; returns the adapter's."""
    key = hash_json([seed, *answers])[3:13]
    run = root / f"run-{key}"
    adapter = adapter_folder(run / "adapter", seed, run=key, **said)
    rows = [
        {"row_id": f"rows.jsonl:{n}", "prediction": a, "reference": "red", "scores": {"accuracy": float(a == "red")},
         "stopped": True}
        for n, a in enumerate(answers)
    ]  # fmt: skip
    write_jsonl(run / "test" / "adapter.items.jsonl", rows)
    write_json(run / "policy.json", {"policy": {}})
    return adapter


# --- other processes ---------------------------------------------------------------------------------------------


def in_process(work: Callable[[], None], errors: Path) -> Any:
    """``work`` in a forked process; what it raises is written to ``errors``."""

    def guarded() -> None:
        try:
            work()
        except BaseException:
            errors.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=guarded)
    process.start()
    return process


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object], errors: Path) -> bool:
    """Do ``work`` in a process of its own; whether it was killed."""
    process = in_process(work, errors)
    process.join(60)
    assert not errors.exists(), errors.read_text()
    return bool(process.exitcode == -signal.SIGKILL)


def kill_at(owner: Any, name: str, number: int) -> None:
    """From here on this process is killed in the place of the ``number``-th call of ``owner.name``."""
    original, count = getattr(owner, name), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            kill()
        return original(*arguments, **named)

    setattr(owner, name, counted)
