"""What vLLM makes of a PEFT adapter: what it rejects, what it drops without a word, and what must be said at its start.

The facts are those of vLLM 0.32 (``lora/peft_helper.py``, ``lora/lora_model.py``, ``config/lora.py``) as a table over
``adapter_config.json`` and the names of the tensors. Findings have a level:

- ``rejected``: vLLM answers with an error when the adapter is loaded;
- ``dropped``: it loads and computes something else, or the base alone;
- ``converted``: recent releases take it, older ones computed it wrongly; the export writes it plainly;
- ``note``: the server has to be started or called in a certain way.

It starts no server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunegate.adapter.files import tensor_name
from tunegate.adapter.spec import AdapterSpec
from tunegate.export.flat import Flat

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
DEFAULT_RANK = 16
AGAINST = ("rejected", "dropped")  # levels of an adapter that would not act
HEAD_VOCABULARY = 258_048  # the largest vocabulary with an adapter on the head
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
_NEEDED = ("r", "lora_alpha", "target_modules")
_PREFIX = "base_model.model."
_MERGE = "export the merged model: --to vllm does so for DoRA, `tunegate merge` always"


@dataclass(frozen=True)
class Finding:
    level: str
    what: str
    fix: str = ""


def _filled(value: Any) -> bool:
    return value not in (None, False, "", [], {})


_CONFIG: tuple[tuple[str, str, Callable[[Any], bool], str, str], ...] = (
    ("use_dora", "rejected", _filled, "DoRA", _MERGE),
    ("modules_to_save", "rejected", lambda v: bool(set(v or ()) - {"classifier", "score"}), "full weights", _MERGE),
    ("bias", "rejected", lambda v: v not in (None, "none"), "trained biases", _MERGE),
    ("lora_bias", "rejected", _filled, "a bias on lora_B", _MERGE),
    ("init_lora_weights", "rejected", lambda v: v not in _INITS, "an initialisation that changes the base", _MERGE),
    ("alora_invocation_tokens", "rejected", _filled, "activated LoRA", ""),
    ("layer_replication", "rejected", _filled, "repeated layers", ""),
    ("use_bdlora", "rejected", _filled, "block-diagonal factors", ""),
    ("use_qalora", "rejected", _filled, "pooled inputs", ""),
    ("use_rslora", "converted", _filled, "rsLoRA's scale becomes an alpha", "--to vllm"),
    ("rank_pattern", "converted", _filled, "ranks of single modules become the largest, with zeros", "--to vllm"),
    ("alpha_pattern", "converted", _filled, "alphas of single modules go into B", "--to vllm"),
)


def findings(
    config: Mapping[str, Any], tensors: Sequence[str], modules: Sequence[str], vocabulary: int
) -> list[Finding]:
    """Everything about an adapter that matters to vLLM. ``modules`` are all module paths of the base."""
    found = [Finding(level, f"{key}: {what}", fix) for key, level, test, what, fix in _CONFIG if test(config.get(key))]
    if missing := [key for key in _NEEDED if config.get(key) is None]:
        found.append(Finding("rejected", f"adapter_config.json has no {', '.join(missing)}"))
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    if odd := [value for value in ranks if value is not None and (type(value) is not int or value < 1)]:
        found.append(Finding("rejected", f"not a rank: {', '.join(map(repr, odd))[:80]}"))
    rank = max((value for value in ranks if type(value) is int), default=0)
    if rank > RANKS[-1]:
        found.append(Finding("rejected", f"rank {rank}, and at most {RANKS[-1]} is served", _MERGE))
    elif rank > DEFAULT_RANK:
        needed = next(size for size in RANKS if size >= rank)
        found.append(Finding("note", f"rank {rank} needs the server's --max-lora-rank {needed}"))
    found += _of_tensors(tensors, set(modules), vocabulary)
    found.append(Finding("note", "the server's own chat template is used: start it with --chat-template"))
    found.append(Finding("note", "load changed weights from a new path: the cache of prefixes goes by name and path"))
    return found


def _of_tensors(tensors: Sequence[str], modules: set[str], vocabulary: int) -> list[Finding]:
    last = {path.rpartition(".")[2] for path in modules}
    found: dict[tuple[str, str, str], list[str]] = {}  # what is wrong with which tensors
    for name in sorted(tensors):
        path, part = name.removeprefix(_PREFIX), ""
        for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if path.endswith(ending):
                path, part = path[: -len(ending)], ending
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            wrong = "dropped", "a full weight", _MERGE
        elif not part and path.rpartition(".")[0].rpartition(".")[2] not in ("score", "classifier"):
            wrong = "rejected", "not A or B of an adapter", _MERGE
        elif part and path not in modules:
            level = "dropped" if path.rpartition(".")[2] in last else "rejected"  # it looks at the last name only
            wrong = level, "the base has no such module", ""
        elif part.startswith(".lora_A") and path == "lm_head" and vocabulary > HEAD_VOCABULARY:
            wrong = "rejected", f"an adapter on a head of {vocabulary} tokens", _MERGE
        else:
            continue
        found.setdefault(wrong, []).append(name)
    return [Finding(level, f"{_some(names)}: {what}", fix) for (level, what, fix), names in found.items()]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"


def plain(flat: Flat) -> Flat:
    """The same adapter with a whole number as alpha, which is what vLLM's reader of the config expects."""
    if float(flat.alpha).is_integer():
        return flat
    modules = {path: replace(f, b=f.b * flat.scale) for path, f in flat.modules.items()}
    return Flat(flat.rank, 1.0, modules, tuple(modules), flat.padded)


def as_peft(flat: Flat) -> tuple[AdapterSpec, dict[str, Any]]:
    """A flat adapter as a plain LoRA: spec and tensors by PEFT's names."""
    spec = AdapterSpec(flat.rank, flat.alpha, target_modules=tuple(flat.modules))
    state = {}
    for path, factors in flat.modules.items():
        state[tensor_name(path, "lora_A")], state[tensor_name(path, "lora_B")] = factors.a, factors.b
    return spec, state
