"""The sections of a task file as frozen pydantic models: every key, its type, its default and what it means.

Unknown keys are rejected, nothing is converted, and what can be checked without looking at data or a base is checked
here. ``config`` reads files and says where each value came from.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tunegate.config_problems import Place
from tunegate.errors import InputError
from tunegate.gate_rules import parse_rule

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
    quantization: Literal["none", "nf4", "fp4", "int4", "int8"] = Field(
        "none", description="nf4: 4 bits a weight while training (QLoRA); fp4 and int4 are less exact, int8 is more"
    )
    quantization_block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights per scale, of 4 bits; int8 has one scale for each row"
    )
    double_quantization: bool = Field(True, description="scales in 8 bits too, of 4 bits")
    keep_unquantized: tuple[str, ...] = Field((), description="layers to leave as they are, by name or path ending")

    @field_validator("quantization_block")
    @classmethod
    def _rows_have_no_block(cls, value: int, info: ValidationInfo) -> int:
        if value != 64 and info.data.get("quantization") == "int8":
            raise ValueError("int8 has one scale for each row; a block size is for nf4, fp4 and int4")
        return value


class DataSection(Section):
    """Labelled examples. ``data: FILE`` is short for ``data: {train: FILE}``."""

    train: tuple[str, ...] = Field(description="files or datasets:NAME[:CONFIG][#SPLIT]; one or a list")
    valid: tuple[str, ...] | None = Field(None, description="default: a share of train")
    test: tuple[str, ...] | None = Field(None, description="default: a share of train")
    form: Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text", "labelled"] = Field(
        "auto", description="of the rows; auto tells it by their keys"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our field: your column")
    system: str | None = Field(None, description="system message for rows that have none")
    group_by: str | None = Field(None, description="column whose rows stay on one side of a split")
    valid_fraction: Fraction = Field(0.1, description="share of train for the eval gate")
    test_fraction: Fraction = Field(0.1, description="share of train for the final test")
    split_salt: str = Field("", description="another value gives another split")
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip leaves them out and counts them")
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
    """The adapter and its optimizer."""

    method: Literal["lora", "rslora", "dora"] = Field("lora", description="rslora: scale alpha/sqrt(rank)")
    rank: int = Field(16, ge=1, le=4096)
    alpha: Positive | None = Field(None, description="default 2*rank")
    dropout: Fraction = 0.05
    target_modules: str | tuple[str, ...] = Field("all-linear", description="names, or one regular expression")
    exclude_modules: tuple[str, ...] = Field((), description="names that get no adapter")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks by regular expression: {q_proj: 32}"
    )
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict, description="as rank_pattern")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, description="default: every layer")
    epochs: Positive = 3.0
    max_steps: int | None = Field(None, ge=1, description="fewer steps than the epochs have")
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

    min_score: float | None = Field(None, description="primary metric on the test split")
    min_gain_over_base: float | None = Field(0.0, description="on the same items; the whole interval has to lie above")
    min_gain_over_prompt: float | None = Field(0.0, description="over the best prompt baseline")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="of the two-sided intervals")
    min_test_items: int | None = Field(50, ge=1)
    min_stop_rate: float | None = Field(0.95, ge=0.0, le=1.0, description="share of answers that end by themselves")
    max_leaked_test_rows: int | None = Field(0, ge=0, description="test rows that are in train")
    max_overfit_ratio: float | None = Field(3.0, gt=0.0, description="validation loss over training loss")
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


class JudgeSection(Section):
    """A model that scores answers from 1 to 5 (docs/judge.md). Off unless it stands here."""

    provider: Literal["openai", "anthropic", "url"] = Field(description="url: any OpenAI-compatible server")
    model: str = Field(description="the model's name at the provider")
    url: str | None = Field(None, description="http(s)://HOST/v1; needed for provider url")
    key_env: str | None = Field(None, description="variable with the key; default: the provider's own")
    rubric: str | dict[str, Any] | None = Field(None, description="YAML file, or its keys here; default: built in")
    items: int | None = Field(100, ge=1, description="test items, the same for every run; null: all")
    samples: int = Field(1, ge=1, le=20, description="how often each answer is scored")
    pairs: Literal["none", "base", "best_prompt"] = Field("none", description="whose answers to compare with")
    temperature: float | None = Field(None, ge=0.0, le=2.0, description="null: not sent, the model's own")
    max_tokens: int = Field(1024, ge=64, description="of one reply, reasoning included")
    structured: bool = Field(True, description="ask the API for JSON of the schema; false: in words only")
    price_in: float | None = Field(None, ge=0.0, description="$ per million tokens")
    price_out: float | None = Field(None, ge=0.0, description="$ per million tokens")
    budget: Positive | None = Field(None, description="$ for all runs of the task; a hard stop, needs both prices")
    requests_per_minute: Positive | None = None
    parallel: int = Field(4, ge=1, le=64, description="requests at once")
    attempts: int = Field(5, ge=1, le=20, description="for one reply")
    timeout: Positive = Field(120.0, description="seconds for one request")


class Task(Section):
    """The whole file."""

    base: BaseSection
    data: DataSection
    task: TaskSection
    train: TrainSection = TrainSection()
    gate: GateSection = GateSection()
    regression: RegressionSection | None = None
    safety: SafetySection | None = None
    judge: JudgeSection | None = None
    name: str | None = Field(None, description="default: the file's name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    output: str | None = Field(None, description="run folder; default: runs/NAME beside the file")
    registry: Place | None = Field(None, description="finished runs are added there: default, folder or database URL")
