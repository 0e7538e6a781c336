"""``adapter_config.json`` to and from :class:`AdapterSpec`, in the field set of PEFT 0.21.

Reading refuses whatever would make the adapter compute something that LoRA or DoRA on linear layers does not:
PEFT drops keys it does not know and only warns, so a file from a newer release can mean more than it is run as. A
key this module does not know is accepted when its value is empty (null, false, "", [] or {}), else refused.

Writing lists the target modules explicitly, so that PEFT's rules select exactly the modules that were trained, and
in an order that does not change between runs.

It does not read tensors: ``files`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunegate.adapter.inject import Injection
from tunegate.adapter.layers import is_conv1d
from tunegate.adapter.spec import AdapterSpec, named, pattern_key
from tunegate.errors import InputError, Problem

FORMAT_VERSION = "0.21.2"  # the PEFT release whose field set is written
MAX_CONFIG_BYTES = 8 << 20

# Fields that say nothing about the function the adapter computes.
_INFORMATION = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",  # follows from the layer's type
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_SPEC_FIELDS = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
_MEANING = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "arrow routing",
    "ensure_weight_tying": "adapters tied across layers",
    "kasa_config": "KaSA's singular values",
    "layer_replication": "a base with repeated layers",
    "lora_bias": "a bias on lora_B",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "full weights beside the adapter",
    "monteclora_config": "sampled adapters",
    "target_parameters": "adapters on bare parameters (mixture-of-experts tensors)",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "pooled inputs",
    "velora_config": "VeLoRA",
}
# Initialisations that leave the base's weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
_SAFE_INITS: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} appears twice")
        seen[key] = value
    return seen


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; :class:`InputError` if it is missing, too large, or not one plain object."""
    where = str(path)
    if not path.is_file():
        raise InputError("no such file", where=where, fix="give the folder that holds adapter_config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError("too large", where=where, expected=f"at most {MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise InputError("not valid JSON", where=where, got=str(error)) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=where, got=type(value).__name__)
    return value


def spec_from_config(config: Mapping[str, Any], where: str) -> AdapterSpec:
    """The spec a PEFT config describes; :class:`InputError` with everything in it that we cannot express."""
    problems: list[Problem] = []
    for key in sorted(config):
        problem = _refuse(key, config[key])
        if problem:
            problems.append(Problem(problem.what, f"{where}: {key}", problem.expected, problem.got, problem.fix))
    if "peft_type" not in config:
        problems.append(Problem("missing key", f"{where}: peft_type", "'LORA'"))
    values, wrong = _spec_values(config)
    problems += [Problem(p.what, f"{where}: {p.where}", p.expected, p.got, p.fix) for p in wrong]
    if problems:
        raise InputError(problems)
    try:
        return AdapterSpec(**values)
    except InputError as error:
        theirs = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        raise InputError(
            [
                Problem(p.what, f"{where}: {theirs.get(p.where, p.where)}", p.expected, p.got, p.fix)
                for p in error.problems
            ]
        ) from error


def _refuse(key: str, value: Any) -> Problem | None:
    got = json.dumps(value)[:200]
    if key in _SPEC_FIELDS or key in _INFORMATION:
        return None
    if key == "peft_type":
        return None if value == "LORA" else Problem("another kind of adapter", expected="'LORA'", got=got)
    if key == "task_type":
        return None if value in ("CAUSAL_LM", None) else Problem("another task", expected="'CAUSAL_LM'", got=got)
    if key == "bias":
        trained = "the base's biases were trained too; a LoRA adapter alone does not hold them"
        return None if value in ("none", None) else Problem(trained, expected="'none'", got=got)
    if key == "init_lora_weights":
        if value in _SAFE_INITS:
            return None
        what = "this initialisation changes the base's weights, so the adapter does not fit the plain base"
        fix = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        return Problem(what, expected="an initialisation that leaves the base alone", got=got, fix=fix)
    if key == "loftq_config" or _empty(value):  # PEFT itself ignores loftq_config unless init_lora_weights is "loftq"
        return None
    if key in _MEANING:
        return Problem(f"not supported: {_MEANING[key]}", expected="the default", got=got)
    fix = "it may come from a newer PEFT release; export the adapter without it"
    return Problem("unknown key with a value", expected="no such key", got=got, fix=fix)


def _spec_values(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """AdapterSpec's arguments, with problems for wrong types; ranges are AdapterSpec's own business."""
    problems: list[Problem] = []

    def take(key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = config.get(key, default)
        value = default if value is None else value
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not right:
            problems.append(Problem("wrong type", key, expected, type(value).__name__))
        return value if right else default

    def take_list(key: str, kind: type, expected: str, scalar: bool = True) -> tuple[Any, ...]:
        value = config.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value] if scalar else None
        if items is None or not all(isinstance(i, kind) and not isinstance(i, bool) for i in items):
            problems.append(Problem("wrong type", key, expected, json.dumps(value)[:200]))
            return ()
        return tuple(items)

    names = "a string or a list of strings"
    selections = {}
    for key in ("target_modules", "exclude_modules"):
        text = isinstance(config.get(key), str)
        selections[key] = config[key] if text else take_list(key, str, names, scalar=False)
    if not selections["target_modules"] and not problems:
        problems.append(Problem("no target modules", "target_modules", names))
    layers = take_list("layers_to_transform", int, "an integer or a list of integers")
    values = {
        **selections,
        "rank": take("r", 8, (int,), "an integer"),
        "alpha": take("lora_alpha", 8, (int, float), "a number"),
        "dropout": take("lora_dropout", 0.0, (int, float), "a number"),
        "use_rslora": take("use_rslora", False, (bool,), "true or false"),
        "use_dora": take("use_dora", False, (bool,), "true or false"),
        "rank_pattern": take("rank_pattern", {}, (dict,), "an object"),
        "alpha_pattern": take("alpha_pattern", {}, (dict,), "an object"),
        "layers_to_transform": layers or None,
        "layers_pattern": take_list("layers_pattern", str, names) if layers else (),
    }
    return values, problems


def _number(value: float) -> int | float:
    """Whole numbers as integers: some readers of the format take nothing else for alpha."""
    return int(value) if float(value).is_integer() else float(value)


def _target_list(paths: Sequence[str], names: Sequence[str]) -> list[str] | str:
    """The shortest of last names, full paths, or (never needed by real models) an expression that selects exactly
    ``paths`` among ``names`` by PEFT's rule."""
    wanted = set(paths)
    for candidate in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if {name for name in names if named(candidate, name)} == wanted:
            return candidate
    return "|".join(re.escape(path) for path in sorted(paths))


def _sorted_pattern(pattern: Mapping[str, float], values: Mapping[str, float], default: float) -> dict[str, Any]:
    """``pattern`` if it gives ``values`` even with its keys sorted (as the file has them), else one key per path."""
    keys = tuple(sorted(pattern))
    chosen = {path: pattern_key(keys, path) for path in values}
    if all(values[path] == (default if key is None else pattern[key]) for path, key in chosen.items()):
        return {key: _number(pattern[key]) for key in keys}
    return {"^" + re.escape(path): _number(value) for path, value in sorted(values.items()) if value != default}


def config_from(injection: Injection, base_name: str, revision: str | None) -> dict[str, Any]:
    """Every field PEFT 0.21 writes, sorted. Selection options are resolved into ``target_modules``."""
    spec, paths = injection.spec, list(injection.modules)
    ranks = {path: spec.rank_for(path) for path in paths}
    alphas = {path: spec.alpha_for(path) for path in paths}
    unused = ("auto_mapping", "corda_config", "eva_config", "exclude_modules", "layers_pattern")
    absent = dict.fromkeys((*_MEANING, *unused, "layers_to_transform", "lora_ga_config"))
    config = {
        **absent,
        "alpha_pattern": _sorted_pattern(spec.alpha_pattern, alphas, spec.alpha),
        "base_model_name_or_path": base_name,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in injection.modules.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": _number(spec.alpha),
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": FORMAT_VERSION,
        "qalora_group_size": 16,
        "r": spec.rank,
        "rank_pattern": _sorted_pattern(spec.rank_pattern, ranks, spec.rank),
        "revision": revision,
        "target_modules": _target_list(paths, injection.names),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_qalora": False,
        "use_rslora": spec.use_rslora,
    }
    return dict(sorted(config.items()))


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config identifies the adapter: meaningful fields, defaults and empty values left out, sets sorted."""
    dropped = _INFORMATION - {"base_model_name_or_path", "revision"}
    kept = {}
    for key, value in config.items():
        if key in dropped or key in ("init_lora_weights", "loftq_config", "task_type", "lora_dropout"):
            continue
        if _empty(value) or (key == "bias" and value == "none"):
            continue
        kept[key] = sorted(value) if isinstance(value, list) else value
    return kept
