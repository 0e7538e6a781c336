"""``tunegate plan``: memory, time and money before a run, and what to choose.

A task file gives the real rows and settings; flags describe a run that does not exist yet. ``--probe`` takes three
steps of the task on this machine; ``--published`` prints predictions beside figures that others measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from tunegate.adapter.spec import AdapterSpec
from tunegate.cli.arguments import task_of
from tunegate.cli.console import Console
from tunegate.cli.parser import SIZES
from tunegate.errors import InputError, Problem
from tunegate.pipeline.planning import Prediction, plan_task, predict
from tunegate.plan.devices import Device, Sheet, load_sheet, total_memory
from tunegate.plan.memory import CHECKPOINTING, Evaluation, MemoryPlan, PlanInputs, estimate
from tunegate.plan.recommend import Option, advise, as_method, best_option, method_name, methods_for, option
from tunegate.plan.shapes import ModelShape, shape_of_folder, shape_of_sizes
from tunegate.plan.time import Workload, even_rows

TARGET_SHARE = 0.25  # of tokens that are answers, where there are no rows to count


def plan(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.published:
        return _published(console)
    sheet = load_sheet(Path(arguments.prices) if arguments.prices else None)
    devices = sheet.named(arguments.device)
    if arguments.task is not None:
        return _of_task(arguments, sheet, devices, console)
    if arguments.probe:
        raise InputError("a probe takes steps of a real task", where="--probe", fix="tunegate plan TASK --probe")
    return _of_flags(arguments, sheet, devices, console)


# --- a task ----------------------------------------------------------------------------------------------------------


def _of_task(arguments: argparse.Namespace, sheet: Sheet, devices: tuple[Device, ...], console: Console) -> int:
    given = [f"--{name.replace('_', '-')}" for name in (*SIZES, "base", "rows", "tokens") if getattr(arguments, name)]
    if given:
        raise InputError("the task file says this already", where=", ".join(given), fix="use --set, or flags alone")
    config = task_of(arguments)
    probed: dict[str, Any] | None = None
    if arguments.probe:
        from tunegate.pipeline.probe import probe

        found = probe(config, console)
        task_plan, prediction, probed = found.plan, found.prediction, found.to_json()
        steps = ", ".join(f"{seconds:.2f}" for seconds in found.step_seconds)
        console.text(
            f"probe: steps of {steps} s; the run: {_bytes(found.bytes)} at the peak, {_time(found.seconds)} of "
            f"training, {_time(found.answer_seconds)} of evaluation"
        )
    else:
        task_plan = plan_task(config, console)
        prediction = predict(task_plan)
    console.text(_rows_line(task_plan.workload))
    _show(task_plan.inputs, task_plan.workload, _methods(arguments, task_plan.inputs), sheet, devices, console)
    console.text(_here_lines(prediction))
    if task_plan.unmet:
        console.text(f"[bold]{escape(task_plan.unmet)}[/]")
    options, here, advice = _decide(arguments, task_plan.inputs, task_plan.workload, devices, task_plan.device)
    _show_advice(advice, console)
    result = _result(task_plan.inputs, task_plan.workload, options, here, advice, sheet)
    console.result({**result, "this_machine": prediction.to_json(), "probe": probed})
    return 0


def _here_lines(prediction: Prediction) -> str:
    plan_, corrected = prediction.plan, prediction.corrected
    return (
        f"this machine: {_bytes(corrected.bytes)} at the peak ({corrected.bytes_from}), "
        f"{_time(corrected.seconds)} for {plan_.workload.steps:,} steps ({corrected.seconds_from}), "
        f"{_time(prediction.answer_seconds)} for {plan_.answers.items:,} answers"
    )


# --- flags ------------------------------------------------------------------------------------------------------------


def _of_flags(arguments: argparse.Namespace, sheet: Sheet, devices: tuple[Device, ...], console: Console) -> int:
    problems = []
    if arguments.overrides:
        problems.append(Problem("there is no task to override", f"--set {arguments.overrides[0]}", fix="name the task"))
    if not arguments.rows or not arguments.tokens:
        fix = "--rows 10000 --tokens 2048, or a task file with real rows"
        problems.append(Problem("the data's size is not given", "--rows, --tokens", fix=fix))
    if arguments.base and any(getattr(arguments, name) for name in SIZES):
        problems.append(Problem("a base and its sizes are both given", "--base", fix="give one of them"))
    if problems:
        raise InputError(problems)
    shape = _shape(arguments, console)
    spec = AdapterSpec(rank=arguments.rank, alpha=2.0 * arguments.rank)
    batch = max(arguments.batch_tokens or 2048, arguments.tokens)
    inputs = PlanInputs(
        shape=shape,
        targets=shape.targets(spec),
        tokens=batch,
        loss_tokens=max(1, round(batch * TARGET_SHARE)),
        quantization=shape.quantized,
        double_quant=shape.double_quant,
        unquantized=shape.kept,
        dropout=True,
        data_tokens=arguments.rows * arguments.tokens,
        evaluation=Evaluation(prompt=max(1, arguments.tokens // 2), new=max(8, arguments.tokens // 8)),
    )
    workload = even_rows(arguments.rows, arguments.tokens, arguments.epochs, batch, targets=TARGET_SHARE)
    _show(inputs, workload, _methods(arguments, inputs), sheet, devices, console)
    options, here, advice = _decide(arguments, inputs, workload, devices, None)
    _show_advice(advice, console)
    console.result(_result(inputs, workload, options, here, advice, sheet))
    return 0


def _shape(arguments: argparse.Namespace, console: Console) -> ModelShape:
    if not arguments.base:
        return shape_of_sizes({name: getattr(arguments, name) for name in SIZES}, tied=arguments.tied)
    from tunegate.model.resolve import resolve_config

    folder, _ = resolve_config(arguments.base, report=console.line)
    return shape_of_folder(folder, arguments.base)


def _methods(arguments: argparse.Namespace, inputs: PlanInputs) -> tuple[str, ...]:
    """The methods to choose from, the preferred one first."""
    if arguments.method:
        possible = methods_for(inputs)
        problems = [
            Problem("the base is stored quantized", f"--method {name}", ", ".join(possible), fix="name the original")
            for name in arguments.method
            if name not in possible
        ]
        if problems:
            raise InputError(problems)
        return tuple(arguments.method)
    wanted = ("dora", "qdora") if inputs.method == "dora" else ("lora", "qlora")
    return wanted[1:] if inputs.quantization else wanted


# --- tables -----------------------------------------------------------------------------------------------------------


def _decide(
    arguments: argparse.Namespace, p: PlanInputs, w: Workload, devices: tuple[Device, ...], own: Device | None
) -> tuple[list[Option], Option | None, Any]:
    methods = _methods(arguments, p)
    options = [best_option(p, w, device, methods) for device in devices]
    here = option(p, w, own, methods[0]) if own is not None else None
    return options, here, advise(w, options, here)


def _show(
    p: PlanInputs, w: Workload, methods: tuple[str, ...], sheet: Sheet, devices: tuple[Device, ...], console: Console
) -> None:
    shape = p.shape
    console.text(
        f"{escape(shape.name)}: {shape.parameters:,} parameters ({shape.linear:,} in linear layers, "
        f"{shape.embedding + shape.head:,} in embeddings and head), {shape.layers} layers of width {shape.hidden:,}"
    )
    if shape.assumed:
        console.text(f"[dim]assumed: {escape('; '.join(shape.assumed))}[/]")
    console.text(
        f"{p.tokens:,} tokens at once, {p.loss_tokens:,} of them targets; {w.tokens:,.0f} tokens in {w.steps:,} steps"
    )
    gpu, cpu = _by_method(p)
    again = "" if p.checkpointing == "none" else f", {p.recomputed} of {p.shape.layers} layers recomputed"
    console.table(["component", *gpu], _memory_rows(gpu), title=f"memory on a GPU{again}")
    console.table(
        ["component", *cpu], _memory_rows(cpu), title=f"memory on this CPU ({_bytes(total_memory())} in all){again}"
    )
    _show_choices(p, console)
    options = [best_option(p, w, device, methods) for device in devices]
    columns = ["device", "method", "needs", "most tokens", "time", "on demand, spot"]
    rows = [_option_row(o, sheet) for o in options if o.inputs is not None]
    title = f"devices that hold it; prices of {sheet.date} ({escape(sheet.path.name)})"
    console.table(columns, rows, title=title) if rows else console.text("no device of the table holds it")
    if any(o.inputs.checkpointing != "none" for o in options if o.inputs is not None):
        console.text("[dim]* with layers recomputed in the backward pass[/]")
    small = [f"{o.device.name} (needs {_bytes(o.memory.total)})" for o in options if o.inputs is None]
    if small:
        console.text(f"[dim]does not fit: {escape(', '.join(small))}[/]")


def _by_method(p: PlanInputs) -> tuple[dict[str, MemoryPlan], dict[str, MemoryPlan]]:
    """Memory by method, on a GPU and on this CPU."""
    runs = {name: as_method(p, name) for name in methods_for(p)}
    gpu = {name: estimate(replace(run, engine="eager", itemsize=2)) for name, run in runs.items()}
    return gpu, {name: estimate(replace(run, engine="native")) for name, run in runs.items() if name != "full"}


def _choices(p: PlanInputs) -> dict[str, dict[str, int]]:
    """Bytes of activations, of those of a kept layer, and of the peak, by what is kept for the backward pass."""
    found: dict[str, dict[str, int]] = {}
    for choice in CHECKPOINTING:
        run = replace(p, checkpointing=choice, kept_layers=p.shape.layers // 2)
        plans = [estimate(replace(run, engine="eager", itemsize=2)), estimate(replace(run, engine="native"))]
        found[choice] = {
            f"{where}_{what}": count
            for where, one in zip(("gpu", "cpu"), plans, strict=True)
            for what, count in (("activations", one.of("activations", "layer at work")), ("peak", one.total))
        }
    return found


def _show_choices(p: PlanInputs, console: Console) -> None:
    words = {"none": "every layer kept", "some": f"{p.shape.layers // 2} of {p.shape.layers} layers kept",
             "all": "layer inputs kept", "offload": "layer inputs in a file"}  # fmt: skip
    rows = [[words[choice], *(_bytes(count) for count in sizes.values())] for choice, sizes in _choices(p).items()]
    columns = ["activations", "on a GPU", "peak", "on this CPU", "peak"]
    console.table(columns, rows, title=f"what the backward pass finds, {method_name(p)}")


def _memory_rows(plans: dict[str, MemoryPlan]) -> list[list[str]]:
    names = list(dict.fromkeys(part.name for one in plans.values() for part in one.at_peak()))
    rows = []
    for name in names:
        held = [sum(part.bytes for part in one.at_peak() if part.name == name) for one in plans.values()]
        rows.append([name, *(_bytes(count) if count else "" for count in held)])
    rows.append(["[bold]peak[/]", *(f"[bold]{_bytes(one.total)}[/]" for one in plans.values())])
    rows.append(["reached in", *(one.peak_phase for one in plans.values())])
    return rows


def _option_row(o: Option, sheet: Sheet) -> list[str]:
    on_demand, spot = o.money
    sign = "$" if sheet.currency == "USD" else f"{sheet.currency} "
    assert o.inputs is not None and o.time is not None
    money = ", ".join("-" if price is None else f"{sign}{price:,.2f}" for price in (on_demand, spot))
    method = o.method if o.inputs.checkpointing == "none" else f"{o.method} *"
    return [o.device.name, method, _bytes(o.memory.total), f"{o.most_tokens:,}", _time(o.time.seconds), money]


def _show_advice(advice: Any, console: Console) -> None:
    console.text("\n[bold]recommended[/]")
    for one in advice:
        console.text(f"  {one.what:<16} {escape(one.value):<14} [dim]{escape(one.reason)}[/]")


def _rows_line(w: Workload) -> str:
    ordered = sorted(w.lengths)
    middle, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    shared = f", {1 - w.computed:.0%} computed once for all" if w.computed < 0.995 else ""
    return (
        f"{len(ordered):,} rows: median {middle:,} tokens, 95 % up to {high:,}, longest {ordered[-1]:,}; "
        f"{w.targets:.0%} targets{shared}"
    )


def _result(
    p: PlanInputs, w: Workload, options: list[Option], here: Option | None, advice: Any, sheet: Sheet
) -> dict[str, Any]:
    gpu, cpu = ({name: one.to_json() for name, one in found.items()} for found in _by_method(p))
    return {
        "inputs": p.to_json(),
        "workload": {"rows": w.rows, "tokens": w.tokens, "steps": w.steps, "epochs": w.epochs,
                     "computed": w.computed, "targets": w.targets},
        "memory": {"gpu": gpu, "cpu": cpu, "by_checkpointing": _choices(p)},
        "devices": [o.to_json() for o in options],
        "prices": {"date": sheet.date, "currency": sheet.currency, "file": str(sheet.path)},
        "here": here.to_json() if here else None,
        "recommendation": [vars(one) for one in advice],
    }  # fmt: skip


def _published(console: Console) -> int:
    from tunegate.plan.published import points

    found = points()
    rows = [
        [p.group, escape(p.what), p.published, f"{p.predicted:,.2f}", p.unit, f"{p.error:+.0%}", escape(p.inputs)]
        for p in found
    ]
    console.table(["group", "figure", "published", "predicted", "unit", "error", "inputs"], rows)
    console.result({"points": [p.to_json() for p in found]})
    return 0


def _bytes(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
    return f"{count / 1e9:,.2f} GB" if count < 10e9 else f"{count / 1e9:,.1f} GB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
