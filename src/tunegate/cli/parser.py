"""What can be typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import tunegate
from tunegate.cli.advise import add_parser as add_advise
from tunegate.cli.arguments import actions_of, whole
from tunegate.cli.deploy import add_parser as add_deploy
from tunegate.cli.export import add_items, add_limits
from tunegate.cli.export import add_parser as add_export
from tunegate.cli.keys import add_parser as add_keys
from tunegate.cli.quantize import size
from tunegate.cli.registry import add_parser as add_registry
from tunegate.cli.review import add_parser as add_review
from tunegate.cli.serve import add_parser as add_serve

# Nothing heavy is imported here: what OpenMP reads when torch is loaded is set after the arguments are known.
SIZES = ("params", "layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
METHODS = ("full", "lora", "dora", "qlora", "qdora")
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

EPILOG = """\
A task is one YAML file; base, data and task are required, the rest has defaults:

  base: smollm2-135m-instruct
  data: tickets.jsonl
  task: accuracy

exit codes: 0 done, 1 failed or held by the gate, 2 wrong use or bad input, 130 interrupted
"""


def _reason(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("say why: the reason is recorded on the card")
    return text


def _size(text: str) -> int:
    """``70B``, ``135M``, ``10k`` or a plain number."""
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        number = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 135M or 70B")
    return number


def _number_of(what: str) -> Callable[[str], float]:
    """The reader of a number above 0, in ``what``."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < 1e6:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}")
        return number

    return read


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunegate",
        description="From labelled examples to a LoRA adapter that is measured, gated and versioned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tunegate {tunegate.__version__}")
    commands = actions_of(parser, "command", "COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.set_defaults(actions=None)
    common.add_argument("--json", action="store_true", help="print one JSON object, no tables or progress")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    task = argparse.ArgumentParser(add_help=False, parents=[common])
    task.add_argument("task", metavar="TASK", help="the task's YAML file")
    task.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file"
    )

    init = commands.add_parser("init", parents=[common], help="write a first task file, every default shown")
    init.add_argument("path", nargs="?", default="task.yaml", metavar="FILE", help="default: task.yaml")
    init.add_argument("--base", default="smollm2-135m-instruct", help="packaged name, local folder or hub id")
    init.add_argument("--data", default="data.jsonl", help="file with labelled examples")
    init.add_argument("--metric", default="exact_match", help="primary metric, for example accuracy")

    _add_check(commands, common)
    _add_plan(commands, common)
    add_advise(commands, task)
    run = commands.add_parser("run", parents=[task], help="check, baseline, train, test, decide: the whole way")
    run.add_argument(
        "--reopen-test",
        type=_reason,
        metavar="WHY",
        help="open a test set that this run has opened; the reason is recorded",
    )
    commands.add_parser("train", parents=[task], help="check and train; `run` goes on from there")
    evaluate = commands.add_parser("eval", parents=[task], help="score the base or an adapter on a split")
    subject = evaluate.add_mutually_exclusive_group()
    subject.add_argument("--adapter", metavar="FOLDER", help="default: the adapter of this task's run")
    subject.add_argument("--plain-base", action="store_true", help="score the base without an adapter")
    for name, what in (("regression", "general ability"), ("safety", "refusals")):
        text = f"measure {what} instead of the split: the adapter beside its base, or the base alone"
        evaluate.add_argument(f"--{name}", action="store_true", help=text)
    text = "let the judge of the task score validation answers: the adapter beside its base, or the base alone"
    evaluate.add_argument("--judge", action="store_true", help=text)
    evaluate.add_argument("--split", choices=("valid", "test"), default="valid")
    evaluate.add_argument(
        "--reopen-test", type=_reason, metavar="WHY", help="the reason, if this test set was opened before"
    )
    evaluate.add_argument(
        "--allow-base-mismatch", action="store_true", help="score an adapter of another base; recorded"
    )

    commands.add_parser("gate", parents=[task], help="judge the run again from its records and its stored policy")
    add_review(commands, common)
    show = commands.add_parser("show", parents=[common], help="show a task's settings, a run or an adapter")
    show.add_argument("path", metavar="TASK|FOLDER", help="task YAML, run folder or adapter folder")
    _add_sweep(commands, task)
    _add_merge(commands, common)
    add_export(commands, common)
    add_serve(commands, common)
    add_keys(commands, common)
    add_deploy(commands, common)
    _add_quantize(commands, common)
    add_registry(commands, common)
    commands.add_parser("doctor", parents=[common], help="which kernels, numbers and libraries run here, and why")
    return parser


def _ranks(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no ranks such as 4,8,16 (different, from 1 to 4096)")
    return tuple(map(int, parts))


def _add_sweep(commands: Any, task: argparse.ArgumentParser) -> None:
    sweep = commands.add_parser(
        "sweep",
        parents=[task],
        help="find the rank: train from the lowest up, while the validation split shows a gain",
        description="Each rank is a normal run, evaluated after each epoch; what is there is not trained again. "
        "The test split stays closed. docs/sweep.md",
    )
    sweep.add_argument("--ranks", type=_ranks, default=(4, 8, 16, 32), metavar="R,R,...", help="default: 4,8,16,32")
    sweep.add_argument("--epochs", type=_number_of("epochs"), metavar="N", help="of each rank; default: the task's")
    sweep.add_argument("--max-trials", type=_size, metavar="N", help="at most so many of the ranks, from below")
    sweep.add_argument(
        "--budget", type=_number_of("minutes"), metavar="MINUTES", help="of this call; the same command goes on"
    )
    sweep.add_argument(
        "--ray", action="store_true", help="all ranks at once on a Ray cluster (RAY_ADDRESS, or one started here)"
    )


def _add_merge(commands: Any, common: argparse.ArgumentParser) -> None:
    merge = commands.add_parser(
        "merge",
        parents=[common],
        help="merge an adapter into its base, with proof that it is the same model",
        description="Streams the base's shards, adds the adapter in fp32, stores the base's dtype. Fails and leaves "
        "nothing where the merged model does not answer as the adapter on its base does.",
    )
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="folder, or NAME@ALIAS in the registry; several are mixed"
    )
    merge.add_argument(
        "-o", "--out", required=True, metavar="FOLDER", help="where the merged model goes; must not exist"
    )
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each adapter; default 1")
    merge.add_argument("--method", default="linear", help="linear, ties, dare_linear or dare_ties; default linear")
    merge.add_argument("--density", type=float, default=1.0, help="share of values that ties and dare keep; default 1")
    merge.add_argument("--seed", type=int, default=0, help="of dare's random choice")
    merge.add_argument("--base", help="default: the base that the adapter's card names")
    merge.add_argument(
        "--onto", choices=("trained", "original"), default="trained",
        help="after training on a quantized base: the dequantized weights that the adapter saw, or the original ones",
    )  # fmt: skip
    add_limits(merge)
    add_items(merge)
    merge.add_argument("--allow-base-mismatch", action="store_true", help="merge into another base; recorded")
    merge.add_argument("--registry", metavar="WHERE", help="refuse adapters of bases that are flagged there")


def _add_check(commands: Any, common: argparse.ArgumentParser) -> None:
    check = commands.add_parser(
        "check",
        parents=[common],
        help="look at the data before anything else",
        description="Report bad rows, duplicates, leaks between splits, conflicting labels, lengths and targets. "
        "Takes a task file, or data files (each treated as a split). Exit code 2 with bad rows.",
    )
    check.add_argument("inputs", nargs="+", metavar="TASK|FILE", help="one task YAML, or data files")
    check.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    check.add_argument("--show", type=whole(0), default=0, metavar="N", help="print N rows as tokens, targets in green")
    check.add_argument("--base", help="with data files: check tokens with this base's tokenizer and template")
    check.add_argument("--form", default="auto", help="with data files: form of the rows (default: auto)")


def _add_quantize(commands: Any, common: argparse.ArgumentParser) -> None:
    quantize = commands.add_parser(
        "quantize",
        parents=[common],
        help="write a base as a checkpoint of 4 or 8 bits",
        description="Quantize the linear layers of a base, tensor by tensor, into bitsandbytes' safetensors, "
        "which tunegate, transformers and vLLM load. Norms, embeddings, the output head and routers are kept.",
    )
    quantize.add_argument("base", metavar="BASE", help="packaged name, local folder or hub id")
    quantize.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    quantize.add_argument("--revision", help="of a hub id: branch, tag or commit")
    quantize.add_argument("--format", choices=("nf4", "fp4", "int8"), default="nf4", help="default: nf4")
    quantize.add_argument("--block", type=int, metavar="N", help="of 4 bits: 32 to 4096, a power of 2 (default: 64)")
    quantize.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32, as int8 does")
    quantize.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAMES",
        help="further layers to keep: paths or endings, by comma",
    )
    quantize.add_argument("--compare", action="store_true", help="measure the error of every format on each weight")
    quantize.add_argument("--report", metavar="FILE", help="write the error of each weight as JSON")
    quantize.add_argument(
        "--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of one file (default: 5GB)"
    )


def _add_plan(commands: Any, common: argparse.ArgumentParser) -> None:
    plan = commands.add_parser(
        "plan",
        parents=[common],
        help="memory, time and money before a run, and what to choose",
        description="Takes a task file with its real rows, or a model (--base, or its sizes) with --rows and --tokens.",
    )
    plan.add_argument("task", nargs="?", metavar="TASK", help="the task's YAML file")
    plan.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    plan.add_argument("--probe", action="store_true", help="take a few steps of the task here, and measure")
    plan.add_argument("--base", help="packaged name, folder or hub id; only its config.json is read")
    for name in SIZES:
        flag = f"--{name.replace('_', '-')}"
        plan.add_argument(flag, type=_size, metavar="N", help="a size of the model, without --base")
    plan.add_argument("--tied", action="store_true", help="head and embeddings are one tensor")
    plan.add_argument("--rows", type=_size, metavar="N", help="rows to train on")
    plan.add_argument("--tokens", type=_size, metavar="L", help="tokens of a row")
    plan.add_argument("--epochs", type=_number_of("epochs"), default=3.0, metavar="N", help="default: 3")
    plan.add_argument("--rank", type=_size, default=16, metavar="R", help="default: 16")
    plan.add_argument("--batch-tokens", type=_size, metavar="N", help="tokens in memory at once; default: 2048")
    plan.add_argument("--method", action="append", choices=METHODS, help="what to choose from, preferred first")
    plan.add_argument("--device", action="append", default=[], metavar="NAME", help="only these devices")
    plan.add_argument("--prices", metavar="FILE", help="a table of devices and prices of your own (YAML)")
    plan.add_argument("--published", action="store_true", help="predictions beside figures that others published")
