"""One measurement in a process of its own: ``python worker.py SPEC.json``, the result as the last line.

``tunegate`` runs the training loop of the package on the given rows. ``peft`` is the loop one would write with
transformers and PEFT: padded batches, AdamW, clipping. ``trl`` is ``SFTTrainer`` fed the same rows as ids and labels.
Every one takes ``warmup`` steps and then ``steps`` timed ones; a step's time holds everything from one optimizer
step to the next, data included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch

RSS_AFTER_TORCH = common.resident(what="VmHWM")


def read_rows(spec: dict[str, Any]) -> list[Any]:
    from tunegate.data.types import Rendered

    found = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
    return [Rendered(str(n), tuple(r["ids"]), tuple(bool(t) for t in r["target"])) for n, r in enumerate(found)]


def settings_of(spec: dict[str, Any], rows: list[Any]) -> Any:
    """The task's training section; epochs enough for the steps asked for."""
    from tunegate.config import TrainSection

    steps = spec["warmup"] + spec["steps"]
    tokens = sum(len(row) for row in rows)
    given = {
        "rank": 16, "alpha": 32.0, "lr": 1e-3, "dropout": 0.0, "seed": 0, "tokens_per_step": 2048,
        "max_steps": steps, "eval_every": 10**9, "checkpoint_every": 10**9, **spec.get("train", {}),
    }  # fmt: skip
    given.setdefault("tokens_per_batch", given["tokens_per_step"])
    given.setdefault("epochs", float(1 + steps * given["tokens_per_step"] // max(1, tokens) * 2))
    return TrainSection(**given)


class Clock:
    """Times between optimizer steps, the warm-up's left out."""

    def __init__(self, warmup: int):
        self.warmup, self.steps, self.last = warmup, 0, time.perf_counter()
        self.seconds: list[float] = []

    def start(self) -> None:
        self.last = time.perf_counter()

    def step(self) -> None:
        now = time.perf_counter()
        self.steps += 1
        if self.steps > self.warmup:
            self.seconds.append(now - self.last)
        self.last = now


# --- tunegate -------------------------------------------------------------------------------------------------------


def tunegate_model(spec: dict[str, Any]) -> Any:
    """The base as a run of tunegate loads it; quantized ones through the pipeline, which knows how."""
    from tunegate.model.loading import load_model

    if not spec.get("quantization"):
        return load_model(Path(spec["base"]), dtype=getattr(torch, spec["dtype"]), narrow=True)
    import rows as made

    from tunegate.config import load_config
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.reporter import Silent
    from tunegate.pipeline.session import Session

    folder = Path(spec["folder"])
    tokenizer = made.renderer(Path(spec["base"])).tokenizer
    chats = made.made_messages(made.PROFILES["intent"], 60, tokenizer, 0)
    lines = [json.dumps({"prompt": c[1]["content"], "completion": c[2]["content"]}) for c in chats]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = {"name": spec["base"], "quantization": spec["quantization"], "compute_dtype": spec["dtype"]}
    task = {"base": base, "data": {"train": "rows.jsonl"}, "task": "exact_match"}
    (folder / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
    session = Session(prepare(load_config(folder / "task.yaml"), Silent()), Silent())
    return session.model


def tunegate_parts(spec: dict[str, Any], rows: list[Any], model: Any = None) -> tuple[Any, Any, Any]:
    from tunegate.adapter.inject import inject
    from tunegate.engine.runner import Runner
    from tunegate.pipeline.session import adapter_spec

    settings = settings_of(spec, rows)
    model = tunegate_model(spec) if model is None else model
    runner = Runner(model)
    return runner, inject(model, adapter_spec(settings), seed=settings.seed), settings


def train_tunegate(spec: dict[str, Any], parts: Any = None) -> dict[str, Any]:
    from tunegate.engine.backends import find_backend
    from tunegate.engine.schedule import StepPlan
    from tunegate.engine.train import Hooks

    rows = read_rows(spec)
    runner, injection, settings = parts or tunegate_parts(spec, rows)
    clock, losses = Clock(spec["warmup"]), []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock.step()
            losses.append(event["loss"])

    clock.start()
    hooks = Hooks(lambda step: (0.0, {}), report)
    result = find_backend(settings.backend)(
        runner, injection, rows, settings, Path(spec["folder"]) / "run", "bench", hooks
    )
    plan = StepPlan(rows, settings)
    tokens = [sum(len(row) for row in plan.rows(n)) for n in range(plan.total)][spec["warmup"] :]
    extra = {"path": f"{runner.path} ({runner.path_reason})", "computed_tokens": result.state.computed_tokens}
    return {"seconds": clock.seconds, "tokens": tokens, "losses": losses, **extra}


# --- a loop with transformers and PEFT ------------------------------------------------------------------------------


def peft_model(spec: dict[str, Any], settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, spec["dtype"])
    quantized = {}
    if spec.get("quantization"):
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=dtype, **quantized)
    if quantized:
        import bitsandbytes

        count = sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
        if not count:
            raise RuntimeError("bitsandbytes replaced no layer")
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(settings.gradient_checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
    elif settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear",
        use_dora=settings.method == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def train_peft(spec: dict[str, Any], model: Any = None) -> dict[str, Any]:
    from tunegate.engine.backends.trl import padded_batches
    from tunegate.engine.schedule import StepPlan

    rows = read_rows(spec)
    settings = settings_of(spec, rows)
    model = peft_model(spec, settings) if model is None else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(settings))
    plan, clock, losses, tokens, computed = StepPlan(rows, settings), Clock(spec["warmup"]), [], [], 0
    model.train()
    clock.start()
    for step in range(plan.total):
        chosen = plan.rows(step)
        (batch,) = padded_batches(chosen, 10**9)  # one padded batch a step, as a loop with a collator has
        if spec.get("reverse"):
            batch = {name: part.flip(0) for name, part in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.step()
        tokens.append(sum(len(row) for row in chosen))
        computed += batch["input_ids"].numel()
    return {"seconds": clock.seconds, "tokens": tokens[spec["warmup"] :], "losses": losses, "computed_tokens": computed}


def _factor(settings: Any) -> Any:
    from tunegate.engine.schedule import lr_factor

    return lambda step: lr_factor(step, settings.max_steps, settings.warmup, settings.schedule)


# --- TRL ------------------------------------------------------------------------------------------------------------


def train_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """``SFTTrainer`` with its own sampler and collator; ``spec["trl"]`` changes its defaults."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(spec)
    settings = settings_of(spec, rows)
    options = {"packing": False, **spec.get("trl", {})}
    mean = sum(len(row) for row in rows) / len(rows)
    size = 1 if options["packing"] else max(1, round(settings.tokens_per_step / mean))
    clock, losses, tokens, padded = Clock(spec["warmup"]), [], [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    arguments = SFTConfig(
        output_dir=spec["folder"], max_steps=settings.max_steps, per_device_train_batch_size=size,
        learning_rate=settings.lr, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, max_length=settings.tokens_per_step, **options,
    )  # fmt: skip
    columns = {
        "input_ids": [list(row.ids) for row in rows],
        "labels": [[i if t else -100 for i, t in zip(row.ids, row.target, strict=True)] for row in rows],
    }
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["base"], dtype=getattr(torch, spec["dtype"])),
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(spec["base"]),
        peft_config=LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear",
            use_dora=settings.method == "dora", task_type="CAUSAL_LM",
        ),
        callbacks=[Watch()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(items: list[Any]) -> Any:
        batch = collate(items)
        padded.append(batch["input_ids"].numel())
        tokens.append(sum(len(item["input_ids"]) for item in items))
        return batch

    trainer.data_collator = counted
    trainer.train()
    done = slice(spec["warmup"], settings.max_steps)  # the loader may have collated a batch ahead
    return {"seconds": clock.seconds, "tokens": tokens[done], "losses": losses, "computed_tokens": sum(padded),
            "rows_per_step": size}  # fmt: skip


# --- checks ---------------------------------------------------------------------------------------------------------


def loss_gap(spec: dict[str, Any]) -> dict[str, Any]:
    """The same steps, batches and start by tunegate and by the PEFT loop, in fp32: both curves."""
    from tunegate.engine.backends.trl import peft_parameters
    from tunegate.engine.checkpoint import load_parameters

    rows = read_rows(spec)
    spec = {**spec, "dtype": "float32"}
    runner, injection, settings = tunegate_parts(spec, rows)
    start = {name: p.detach().clone() for name, p in injection.parameters().items()}
    ours = train_tunegate(spec, (runner, injection, settings))["losses"]
    del runner, injection
    model = peft_model(spec, settings)
    load_parameters(peft_parameters(model), start)
    theirs = train_peft(spec, model)["losses"]
    return {"tunegate": ours, "peft": theirs, "gap": max(abs(a - b) for a, b in zip(ours, theirs, strict=True))}


def curves(spec: dict[str, Any]) -> dict[str, Any]:
    """The loss curves of :func:`loss_gap`, and PEFT's once more with the rows of each batch in reverse: sums in
    another order, the noise that two runs of the same thing have."""
    from tunegate.engine.backends.trl import peft_parameters
    from tunegate.engine.checkpoint import load_parameters

    rows = read_rows(spec)
    spec = {**spec, "dtype": "float32"}
    runner, injection, settings = tunegate_parts(spec, rows)
    start = {key: p.detach().clone() for key, p in injection.parameters().items()}
    found = {"tunegate": train_tunegate(spec, (runner, injection, settings))["losses"]}
    del runner, injection
    for name, reverse in (("peft", False), ("peft again", True)):
        model = peft_model(spec, settings)
        load_parameters(peft_parameters(model), start)
        found[name] = train_peft({**spec, "reverse": reverse}, model)["losses"]
        del model
    return {"losses": found}


def breakdown(spec: dict[str, Any]) -> dict[str, Any]:
    """Where tunegate's steps spend their time: milliseconds and calls a step of each compiled kernel, by a clock around
    its calls. What is left is Python and torch."""
    rows = read_rows(spec)
    parts = tunegate_parts({**spec, "warmup": 0}, rows)
    warm = {**spec, "warmup": 0}
    train_tunegate({**warm, "folder": spec["folder"] + "/warm"}, parts)
    spent = timed_kernels()
    done = train_tunegate({**warm, "folder": spec["folder"] + "/timed"}, parts)
    steps, whole = len(done["seconds"]), sum(done["seconds"])
    rest = whole - sum(seconds for seconds, _ in spent.values())
    found = [{"name": name, "ms": 1e3 * s / steps, "calls": n / steps} for name, (s, n) in spent.items()]
    found.append({"name": "Python and torch", "ms": 1e3 * rest / steps, "calls": None})
    return {"kernels": sorted(found, key=lambda one: -one["ms"]), "step_ms": 1e3 * whole / steps}


def timed_kernels() -> dict[str, tuple[float, int]]:
    """From now on: kernel -> (seconds in it, calls)."""
    from tunegate.kernels import native

    library = native.library()
    if library is None:
        raise RuntimeError("the compiled kernels are not in use: " + native.describe()[1])
    spent: dict[str, tuple[float, int]] = {}

    def timed(name: str, kernel: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return kernel(*args, **named)
            finally:
                seconds, calls = spent.get(name, (0.0, 0))
                spent[name] = seconds + time.perf_counter() - began, calls + 1

        return call

    for name in dir(library):
        kernel = getattr(library, name)
        if not name.startswith("_") and callable(kernel) and not isinstance(kernel, type) and name != "set_threads":
            setattr(library, name, timed(name, kernel))
    return spent


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    if spec["kind"] in ("roofline", "generate"):
        import importlib

        found = importlib.import_module({"roofline": "roofline", "generate": "generation"}[spec["kind"]]).run(spec)
    else:
        kinds = {"tunegate": train_tunegate, "peft": train_peft, "trl": train_trl, "loss_gap": loss_gap}
        found = {**kinds, "curves": curves, "breakdown": breakdown}[spec["kind"]](spec)
    found["rss"] = common.resident(what="VmHWM")
    found["rss_after_torch"] = RSS_AFTER_TORCH
    found["threads"] = torch.get_num_threads()
    print(common.MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
