"""One YAML file, checked before anything runs.

The file is read with line numbers, merged with ``--set`` overrides and validated by frozen pydantic models that
reject unknown keys. Every problem of the file is reported at once, each with its line and the nearest real key.
:class:`Config` remembers where each value came from, so ``alpha=32 (default 2*rank)`` can be printed and kept on
the card. Values that depend on the base or the data (learning rate, answer length) are filled in later by
:meth:`Config.settle`, with their reason as origin.

It does not open data, bases or the network.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunegate.config_problems import Entries, Place, inner_model, overridden_by, problems_of
from tunegate.errors import InputError, Problem
from tunegate.files import hash_json
from tunegate.gate_rules import parse_rule
from tunegate.yaml_file import Parsed, parse, read_text

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
TaskKind = Literal["format", "labels", "knowledge", "skill", "safety"]


class Section(BaseModel):
    # strict: `rank: true` is not 1 and `offline: "no"` is not False; no NaN: it cannot be hashed or compared
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """``6GB`` (10^9), ``6GiB`` (2^30), ``800MB`` in bytes; ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?B)\s*", text.upper())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is not a size: write 6GB, 6GiB or 800MB")
    return int(float(found[1]) * _SIZES[found[2]])


class BaseSection(Section):
    """The frozen model. ``base: NAME`` is short for ``base: {name: NAME}``."""

    name: str = Field(description="packaged name, local folder or hub id")
    revision: str | None = Field(None, description="hub branch, tag or commit; stored as the commit")
    offline: bool = Field(False, description="never ask the hub, use its local cache")
    trust_remote_code: bool = Field(False, description="run Python code that ships with the base")
    template: str | None = Field(None, description="plain, chatml or Jinja text; default: the tokenizer's own")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="dtype of the forward pass")
    quantization: Literal["none", "nf4", "fp4", "int4"] = Field(
        "none", description="nf4: 4 bits a weight while training (QLoRA); fp4 and int4 are less exact"
    )
    quantization_block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="weights per scale")
    double_quantization: bool = Field(True, description="scales in 8 bits too")
    keep_unquantized: tuple[str, ...] = Field((), description="layers to leave as they are, by name or path ending")


class DataSection(Section):
    """Labelled examples. ``data: FILE`` is short for ``data: {train: FILE}``."""

    train: tuple[str, ...] = Field(description="files or datasets:NAME[:CONFIG][#SPLIT]; one or a list")
    valid: tuple[str, ...] | None = Field(None, description="default: a share of train")
    test: tuple[str, ...] | None = Field(None, description="default: a share of train")
    form: Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text", "labelled"] = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="our field: your column")
    system: str | None = Field(None, description="system message for rows that have none")
    group_by: str | None = Field(None, description="column whose rows stay on one side of a split")
    valid_fraction: Fraction = Field(0.1, description="share of train for the eval gate")
    test_fraction: Fraction = Field(0.1, description="share of train for the final test")
    split_salt: str = Field("", description="another value gives another split")
    on_bad_row: Literal["error", "skip"] = "error"
    max_tokens: int = Field(2048, ge=8, description="longest row, in tokens")
    on_long_row: Literal["error", "truncate", "skip"] = Field(
        "error", description="truncate cuts the oldest tokens, never the answer's end"
    )

    _list = field_validator("train", "valid", "test", mode="before")(_as_list)

    @field_validator("train", "valid", "test")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("needs at least one file")
        return value

    @model_validator(mode="after")
    def _room_for_train(self) -> DataSection:
        carved = (0 if self.valid else self.valid_fraction) + (0 if self.test else self.test_fraction)
        if carved > 0.9:
            raise ValueError(f"valid_fraction + test_fraction = {carved:g} leaves too little to train on")
        return self


class PromptSection(Section):
    """A prompt of the user's own to measure against the adapter."""

    name: str
    system: str | None = None
    shots: int = Field(0, ge=0, le=64, description="examples from train put before the question")


class TaskSection(Section):
    """What counts as a good answer. ``task: METRIC`` is short for ``task: {metric: METRIC}``."""

    metric: str = Field(description="primary metric: picks the best checkpoint and goes to the gate")
    report: tuple[str, ...] = Field((), description="further metrics, reported only")
    labels: tuple[str, ...] | str | None = Field(
        None, description="the label set, or a JSON file with it; default for accuracy: answers in train"
    )
    answer_by: Literal["generate", "likelihood"] = Field("generate", description="likelihood: the most likely label")
    json_schema: str | None = Field(None, description="JSON Schema file for metric json_schema")
    pattern: str | None = Field(None, description="regular expression for metric regex")
    max_new_tokens: int | None = Field(None, ge=1, description="default: longest answer + 25 % + 8")
    temperature: float = Field(0.0, ge=0.0, le=5.0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    prompts: tuple[PromptSection, ...] | None = Field(
        None, description="prompt baselines of your own; default: built-in candidates; []: none"
    )
    prompt_items: int = Field(100, ge=1, description="validation items to choose the best prompt on")
    kind: TaskKind | None = Field(None, description="what `advise` takes the task for; default: a guess")
    documents: str | None = Field(None, description="folder of texts that `advise` looks answers up in")

    _list = field_validator("report", mode="before")(_as_list)

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if isinstance(value, tuple):
            twice = [label for label, count in Counter(value).items() if count > 1]
            if len(value) < 2 or twice:
                raise ValueError(f"at least two distinct labels{f' (twice: {twice[0]!r})' if twice else ''}")
        return value


class TrainSection(Section):
    """The adapter and its optimizer. ``method``: lora, rslora (scale alpha/sqrt(rank)) or dora."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(16, ge=1, le=4096)
    alpha: Positive | None = Field(None, description="default 2*rank")
    dropout: Fraction = 0.05
    target_modules: str | tuple[str, ...] = Field("all-linear", description="names, or one regular expression")
    exclude_modules: tuple[str, ...] = ()
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, description="default: every layer")
    epochs: Positive = 3.0
    max_steps: int | None = Field(None, ge=1)
    tokens_per_step: int = Field(2048, ge=16, description="tokens of one optimizer step, about")
    tokens_per_batch: int = Field(2048, ge=16, description="tokens in memory at once")
    share_prefix: bool = Field(True, description="compute a prefix that all rows share once per batch")
    lr: Positive | None = Field(None, description="default follows the size of the base")
    lr_plus_ratio: float = Field(1.0, ge=1.0, description="LoRA+: learning rate of B over that of A")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = Field(0.05, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0.0)
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: moments in 8 bits a value; paged: they may leave the GPU's memory"
    )
    clip: Positive | None = Field(1.0, description="largest gradient norm; null: none")
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] | Literal["offload"] = Field(
        False, description="recompute layers in the backward pass: all, a number, or with their inputs in a file"
    )
    memory: str | None = Field(None, description="budget such as 6GB: recompute as many layers as that needs")
    eval_every: Literal["epoch"] | Annotated[int, Field(ge=1)] = Field(
        "epoch", description="steps between evaluations, or epoch"
    )
    eval_items: int = Field(200, ge=1, description="validation items scored at each evaluation")
    patience: int = Field(2, ge=1, description="stop after so many evaluations without improvement")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0, lt=2**63)
    backend: Literal["native", "trl", "unsloth"] = Field(
        "native", description="who computes the steps; trl and unsloth are extras: pip install 'tunegate[trl]'"
    )
    threads: int | None = Field(None, ge=1, description="default: what torch chooses")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    _list = field_validator("exclude_modules", mode="before")(_as_list)

    @field_validator("memory")
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


class RuleSection(Section):
    """A rule of the gate (docs/gate.md). ``RULE`` is short for ``{rule: RULE}``."""

    rule: str
    confidence: float | None = Field(None, gt=0.5, lt=1.0, description="default: gate.confidence")
    min_items: int | None = Field(None, ge=1, description="with fewer items the rule does not pass")
    required: bool = Field(True, description="false: reported, does not count")

    @field_validator("rule")
    @classmethod
    def _parses(cls, value: str) -> str:
        try:
            return str(parse_rule(value))
        except InputError as error:
            problem = error.problems[0]
            fix = f"; {problem.fix}" if problem.fix else ""
            raise ValueError(f"{problem.expected} ({problem.what}){fix}") from None


class GateSection(Section):
    """Thresholds, fixed before the first step. ``null`` switches a rule off."""

    min_score: float | None = None
    min_gain_over_base: float | None = 0.0
    min_gain_over_prompt: float | None = 0.0
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    min_test_items: int | None = Field(50, ge=1)
    min_stop_rate: float | None = Field(0.95, ge=0.0, le=1.0)
    max_leaked_test_rows: int | None = Field(0, ge=0)
    max_overfit_ratio: float | None = Field(3.0, gt=0.0)
    strict_intervals: bool = Field(False, description="min_score must hold for the whole interval")
    rules: tuple[RuleSection, ...] = Field((), description="more rules: [regression.* >= 0.95 of base]; docs/gate.md")
    correction: Literal["none", "holm"] = Field("none", description="holm: levels corrected for the number of rules")

    @field_validator("rules", mode="before")
    @classmethod
    def _short_rules(cls, value: Any) -> Any:
        rules = _as_list(value)
        return tuple({"rule": r} if isinstance(r, str) else r for r in rules) if isinstance(rules, tuple) else rules


class RegressionSection(Section):
    """What the adapter must not forget (docs/regression.md). Off unless it stands here or a gate rule asks for it."""

    sets: tuple[str, ...] = Field(
        ("regression",), description="regression: the six built-in domains; one of them, files, lm_eval:TASK"
    )
    items: int | None = Field(24, ge=1, description="of each set; null: all")
    run_code: bool = Field(False, description="consent to run code that the model writes (code_run)")
    divergence: bool = Field(True, description="KL from the base on neutral text")

    _list = field_validator("sets", mode="before")(_as_list)


class GuardSection(Section):
    """A model that says whether an answer is safe, behind an OpenAI-compatible URL."""

    url: str = Field(description="http(s)://HOST/v1")
    model: str
    key_env: str | None = Field(None, description="environment variable that holds the key")
    timeout: Positive = Field(60.0, description="seconds for one request")
    parallel: int = Field(4, ge=1, le=64, description="requests at once")


class SafetySection(Section):
    """Refusals of base and adapter (docs/safety.md). Off unless it stands here or a gate rule asks for it."""

    sets: tuple[str, ...] = Field(("redteam",), description="redteam: built in; files: own, garak's, PyRIT's JSONL")
    items: int | None = Field(40, ge=1, description="requests of each set; null: all")
    system_prompts: dict[str, str | None] = Field(
        {"plain": None}, description="name: system message; null: the request as it is"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), description="0 is greedy, others sample")
    temperature: float = Field(0.7, ge=0.0, le=5.0, description="of seeds other than 0")
    max_new_tokens: int = Field(64, ge=8, le=4096)
    guard: GuardSection | None = Field(None, description="judges answers beside the rules: {url: ..., model: ...}")

    _list = field_validator("sets", mode="before")(_as_list)


class Task(Section):
    """The whole file."""

    base: BaseSection
    data: DataSection
    task: TaskSection
    train: TrainSection = TrainSection()
    gate: GateSection = GateSection()
    regression: RegressionSection | None = None
    safety: SafetySection | None = None
    name: str | None = Field(None, description="default: the file's name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    output: str | None = Field(None, description="run folder; default: runs/NAME beside the file")
    registry: Place | None = Field(None, description="finished runs are added there: default, folder or database URL")


_ENTRIES: Entries = {"task.prompts": PromptSection, "gate.rules": RuleSection}  # the lists of mappings
_SHORT = {"base": "name", "data": "train", "task": "metric"}
_SHORT_KEYS = {section: f"{section}.{key}" for section, key in _SHORT.items()}
_SECTIONS = ("base", "data", "task", "train", "gate", "regression", "safety")


@dataclass(frozen=True)
class Config:
    """A validated :class:`Task` with the folder relative paths start from and the origin of every value."""

    task: Task
    folder: Path
    origins: Mapping[str, str]

    @property
    def name(self) -> str:
        assert self.task.name is not None
        return self.task.name

    @property
    def run_dir(self) -> Path:
        return self.path(self.task.output or f"runs/{self.name}")

    def path(self, text: str) -> Path:
        """``text`` as a path; a relative one starts at the task file's folder."""
        try:
            return self.folder / Path(text).expanduser()
        except RuntimeError as error:  # ~name of a user who does not exist
            raise InputError(f"no such home folder: {error}", where=text, fix="write the folder's full path") from None

    @property
    def alpha(self) -> float:
        assert self.task.train.alpha is not None
        return self.task.train.alpha

    def settle(self, key: str, value: Any, reason: str) -> Config:
        """A copy with ``section.key`` set to ``value`` and ``reason`` as its origin."""
        section, name = key.split(".")
        part = getattr(self.task, section).model_copy(update={name: value})
        return dataclasses.replace(
            self,
            task=self.task.model_copy(update={section: part}),
            origins={**self.origins, key: reason},
        )

    def section_hash(self, *sections: str) -> str:
        return hash_json({s: getattr(self.task, s).model_dump(mode="json") for s in sections})

    def items(self) -> Iterator[tuple[str, Any, str]]:
        """Every ``(key, value, origin)`` in file order."""
        for key, value in _flatten(self.task.model_dump(mode="json")):
            yield key, value, self.origins.get(key, "default")


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        if section in Task.model_fields and isinstance(value, dict):
            yield from ((f"{section}.{key}", inner) for key, inner in value.items())
        elif (
            value is not None or inner_model(Task.model_fields[section].annotation) is None
        ):  # not a section that is off
            yield section, value


def describe_defaults(base: str, data: str, metric: str) -> str:
    """A first task file: the three required keys, then every other key as a comment with its default."""
    lines = [
        "# A tunegate task. Only base, data and task are required; commented lines show the defaults.",
        f"base: {json.dumps(base)}",
        f"data: {json.dumps(data)}",
        f"task: {json.dumps(metric)}",
    ]
    for section, field in Task.model_fields.items():
        model = inner_model(field.annotation)
        if model is None:
            continue
        note = f"   # as a mapping, the line above becomes {_SHORT[section]}: ..." if section in _SHORT else ""
        note = note or ("" if field.default else "   # off; this line without its # switches it on")
        lines += ["", f"# {section}:{note}"]
        for name, inner in model.model_fields.items():
            if inner.is_required():
                continue
            default = inner.get_default(call_default_factory=True)
            value = json.dumps(list(default) if isinstance(default, tuple) else default)
            lines.append(f"#   {name}: {value}" + (f"   # {inner.description}" if inner.description else ""))
    return "\n".join(lines) + "\n"


def default_lr(parameters: int) -> tuple[float, str]:
    """Learning rate for a base of ``parameters`` weights, with its reason.

    2e-4 holds for 7-8 B (QLoRA paper, arXiv:2305.14314, table 9: 2e-4 at 7B and 13B, 1e-4 at 33B and 65B); smaller
    bases want more. The rule lr = 2e-4 * (8e9 / n)^0.4, kept within [1e-4, 1e-3], meets the paper's points and the
    1e-3 that SmolLM2-135M was measured to like.
    """
    lr = min(max(2e-4 * (8e9 / parameters) ** 0.4, 1e-4), 1e-3)
    lr = float(f"{lr:.2g}")
    return lr, f"default for {parameters / 1e6:,.0f}M parameters: 2e-4*(8e9/n)^0.4 within 1e-4..1e-3"


# --- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> Parsed:
    parsed = parse(read_text(path), str(path), path.name)
    if not isinstance(parsed.value, dict):
        empty = parsed.value is None
        raise InputError(
            "the file is empty" if empty else "a task is a mapping of keys",
            where=str(path),
            expected="" if empty else "base:, data:, task:",
            got="" if empty else type(parsed.value).__name__,
            fix="`tunegate init` writes a first task.yaml",
        )
    values, lines = parsed.value, parsed.lines
    for section, key in _SHORT.items():
        if isinstance(values.get(section), (str, list)):
            values[section] = {key: values[section]}
            lines[f"{section}.{key}"] = lines.get(section, 1)
            for entry in range(len(values[section][key])):
                lines[f"{section}.{key}.{entry}"] = lines.get(f"{section}.{entry}", lines.get(section, 1))
    for section in _SECTIONS:
        if section in values and values[section] is None:  # a section whose lines are all commented out
            values[section] = {}
    return parsed


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], problems: list[Problem]) -> set[str]:
    """Set ``section.key=value`` pairs; a value is YAML. Adds to ``problems``, returns the keys set."""
    done = set()
    for text in overrides:
        where = f"--set {text[:80]}"
        key, equals, raw = text.partition("=")
        if not equals or not key:
            problems.append(Problem("an override is KEY=VALUE", where, fix="for example --set train.rank=8"))
            continue
        try:
            parsed = parse(raw, where, where)
        except InputError as error:
            problems += error.problems
            continue
        problems += parsed.problems
        if key in _SHORT_KEYS and not isinstance(parsed.value, dict):
            key = _SHORT_KEYS[key]
        *sections, last = key.split(".")
        target: Any = values
        for part in sections:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                problems.append(Problem(f"{part!r} is not a mapping of keys in the file", where))
                break
        else:
            target[last] = parsed.value
            done.add(key)
    return done


def freeze(value: Any) -> Any:
    """Lists as tuples, what strict pydantic takes for a tuple field."""
    if isinstance(value, dict):
        return {key: freeze(inner) for key, inner in value.items()}
    return tuple(freeze(inner) for inner in value) if isinstance(value, list) else value


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and ``--set`` overrides. :class:`InputError` lists every problem of the file."""
    path = Path(path)
    parsed = _read(path)
    problems = parsed.problems
    overridden = _apply_overrides(parsed.value, overrides, problems)
    try:
        task = Task.model_validate(freeze(parsed.value))
    except ValidationError as error:
        raise InputError(problems + problems_of(error, Task, _ENTRIES, path.name, parsed.lines, overridden)) from None
    if problems:
        raise InputError(problems)
    return _with_origins(task, path, parsed.lines, overridden)


def _with_origins(task: Task, path: Path, lines: Mapping[str, int], overridden: set[str]) -> Config:
    origins = {}
    for key, _ in _flatten(task.model_dump(mode="json")):
        if overridden_by(key, overridden):
            origins[key] = "--set"
        elif key in lines:
            origins[key] = f"{path.name}:{lines[key]}"
        else:
            origins[key] = "default"
    config = Config(task, path.resolve().parent, origins)
    if task.train.alpha is None:
        config = config.settle("train.alpha", 2.0 * task.train.rank, "default 2*rank")
    if task.name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "task"
        config = dataclasses.replace(
            config,
            task=config.task.model_copy(update={"name": name}),
            origins={**config.origins, "name": "default: the file's name"},
        )
    return config
