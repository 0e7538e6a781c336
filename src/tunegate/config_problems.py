"""What is wrong with a task file, from what pydantic found: key, line, what was expected, the nearest real key.

Passwords in URLs are not shown, and :data:`Place` takes none. It reads no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ValidationError

from tunegate.errors import Problem, nearest, without_secrets

Entries = Mapping[str, type[BaseModel]]

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "invalid_key": "a key that is text",
}

# What PEFT, TRL and Axolotl call a setting, where that is far from the name here.
_ELSEWHERE = {
    **dict.fromkeys(("base_model", "model", "model_name_or_path"), "base"),
    "load_in_4bit": "base.quantization: nf4",
    "load_in_8bit": "base.quantization: int8",
    **dict.fromkeys(("dataset", "datasets"), "data"),
    **dict.fromkeys(("cutoff_len", "max_length", "max_seq_length", "sequence_len"), "data.max_tokens"),
    "val_set_size": "data.valid_fraction",
    "use_dora": "train.method: dora",
    "use_rslora": "train.method: rslora",
    **dict.fromkeys(("r", "lora_r"), "train.rank"),
    "lora_alpha": "train.alpha",
    "lora_dropout": "train.dropout",
    **dict.fromkeys(("lora_target_modules", "modules"), "train.target_modules"),
    "layers_to_transform": "train.layers",
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps"), "train.tokens_per_step"),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size"), "train.tokens_per_batch"),
    "learning_rate": "train.lr",
    "loraplus_lr_ratio": "train.lr_plus_ratio",
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "train.schedule"),
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "max_grad_norm": "train.clip",
    "eval_steps": "train.eval_every",
    "save_steps": "train.checkpoint_every",
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), "train.patience"),
    "output_dir": "output",
}


def _no_password(value: str) -> str:
    if without_secrets(value) != value:
        raise ValueError("a URL without a password, because settings are kept on cards: use ~/.pgpass or PGPASSWORD")
    return value


Place = Annotated[str, AfterValidator(_no_password)]


def _show(value: Any) -> str:
    text = without_secrets(repr(list(value) if isinstance(value, tuple) else value))
    return text if len(text) <= 120 else text[:117] + "..."


def overridden_by(key: str, overridden: set[str]) -> str:
    """The override that set ``key``, a part of it or the mapping it stands in; empty if none did."""
    for done in sorted(overridden):
        if done == key or key.startswith(done + ".") or done.startswith(key + "."):
            return done
    return ""


def _walk(location: Sequence[str | int], root: type[BaseModel], entries: Entries) -> tuple[str, list[str]]:
    """Pydantic's location as a dotted key without its union branches, and the real keys at its last level."""
    model: Any = root
    parts: list[str] = []
    for part in location:
        fields = getattr(model, "model_fields", None)
        if fields is not None:
            parts.append(str(part))
            if part not in fields:
                return ".".join(parts), list(fields)
            model = inner_model(fields[part].annotation) or fields[part].annotation
        elif isinstance(part, int):  # an entry of a list
            model = entries.get(".".join(parts))
            parts.append(str(part))
        elif get_origin(model) is dict:
            parts.append(part)
            model = None
    return ".".join(parts), []


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, as ``X`` or as ``X | None``; None if it holds none."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a field that is one of a few, as ``Literal[...]`` or as ``Literal[...] | None``; else none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return choices_of(parts[0]) if len(parts) == 1 and get_origin(parts[0]) is Literal else ()


def _fix(kind: str, item: Mapping[str, Any]) -> str:
    value = item["input"]
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f'put it in quotes: "{value}"'
    if kind == "literal_error" and isinstance(value, str):
        return nearest(value, re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return ""


def problems_of(
    error: ValidationError,
    root: type[BaseModel],
    entries: Entries,
    file: str,
    lines: Mapping[str, int],
    overridden: set[str],
) -> list[Problem]:
    """Every problem that pydantic found in ``root``, one a key, in the order of ``file``. ``entries``: the model of
    each list of mappings, by its dotted key. ``overridden``: the keys that came from the command line instead."""
    found: dict[str, Problem] = {}
    places: dict[str, float] = {}
    for item in error.errors(include_url=False):
        key, names = _walk(item["loc"], root, entries)
        kind = item["type"]
        line = lines.get(key) or lines.get(key.rpartition(".")[0])
        override = overridden_by(key, overridden) if kind != "missing" else ""
        places[key] = math.inf if override or not line else line
        where = f"--set {override}" if override else f"{file}:{line}" if line else file
        if kind == "extra_forbidden":
            name = key.rpartition(".")[2]
            here = f"here it is `{_ELSEWHERE[name]}`" if name in _ELSEWHERE else ""
            fix = here or nearest(name, names) or f"known keys: {', '.join(names)}"
            found[key] = Problem(f"unknown key {key!r}", where, fix=fix)
        elif kind == "missing":
            help_ = "" if "." in key else "`tunegate init` writes a first task.yaml"
            found[key] = Problem(f"required key {key!r} is missing", where, fix=help_)
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            expected, fix = _EXPECTED.get(kind, message), _fix(kind, item)
            if key in found and expected not in found[key].expected:  # another branch of the same union
                expected, fix = f"{found[key].expected} or {expected}", found[key].fix or fix
            found[key] = Problem(f"{key}: wrong value", where, expected=expected, got=_show(item["input"]), fix=fix)
    return [found[key] for key in sorted(found, key=places.__getitem__)]
