"""Collect the target layers of a model, then swap each for a wrapper that holds it.

Nothing is touched before every name, rank and pattern has been checked; all problems are reported together, with
the nearest real names. Every parameter of the model is frozen, and each A is drawn from its own generator, seeded by
(seed, module path), so that a layer's start does not depend on which other layers are adapted or in what order.

``all-linear`` is every layer that can carry an adapter except the output head, any layer that shares its weight with
the input embeddings, and the routers of a mixture of experts. :func:`left_out` says what else it does not reach.

It does not unfreeze: ``remove`` puts the original layers back, still frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import nn

from tunegate.adapter.layers import AdapterLayer, DoRALinear, LoRALinear, features
from tunegate.adapter.spec import AdapterSpec, named, pattern_key, shorten
from tunegate.errors import InputError, Problem, nearest
from tunegate.model.experts import fused_experts, is_router


@dataclass(frozen=True)
class Injection:
    """An adapter in place. ``modules`` maps paths in the plain model to wrappers, in the model's order.

    ``names`` are the paths of all modules of the plain model. ``trainable`` counts the adapter's parameters;
    ``total`` adds the base's own ``nn.Parameter`` elements, tied ones once (packed 4-bit codes count as stored).
    """

    spec: AdapterSpec
    modules: dict[str, AdapterLayer]
    names: tuple[str, ...]
    trainable: int
    total: int

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by ``path.name``, sorted by name: the canonical order."""
        found = {
            f"{path}.{name}": parameter
            for path, layer in self.modules.items()
            for name, parameter in layer.adapter_parameters().items()
        }
        return dict(sorted(found.items()))


def find_targets(
    model: nn.Module, spec: AdapterSpec, *, strict: bool = True
) -> tuple[dict[str, nn.Module], list[Problem]]:
    """The layers ``spec`` selects, by path in the model's order, and everything wrong with the selection.

    ``strict`` also reports what has no effect: names, patterns, exclusions and layer indices that match nothing.
    Reading a file is not strict, because PEFT writes such names and the file's tensors decide.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    if any(isinstance(module, AdapterLayer) for module in modules.values()):
        raise InputError(
            "the model already carries an adapter", fix="remove it first: tunegate.adapter.inject.remove(model)"
        )
    linear = {path: sizes for path, module in modules.items() if (sizes := features(module))}
    head = head_paths(model)
    chosen = [
        path
        for path in modules
        if spec.selects(path, path in linear and path not in head and not is_router(model, path))
    ]
    targets = {path: modules[path] for path in chosen if path in linear}
    problems = [
        Problem(
            "a target module cannot carry an adapter",
            path,
            "a linear layer",
            type(modules[path]).__name__,
            "name the linear layers inside it, or write an expression that matches them alone",
        )
        for path in chosen
        if path not in linear
    ]
    if strict:
        problems += _unused(spec, list(modules), list(linear), list(targets))
    if not chosen and not problems:
        problems.append(_nothing_left(spec, list(linear)))
    for path in targets:
        smallest, rank = min(linear[path]), spec.rank_for(path)
        if rank > smallest:
            got = f"rank {rank} on a layer of {linear[path][1]} x {linear[path][0]} (out x in)"
            fix = f"lower the rank, or set rank_pattern for this module to {smallest} or less"
            problems.append(Problem("the rank exceeds the layer", path, f"rank <= {smallest}", got, fix))
    return targets, problems


def servable(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the plain model that may carry an adapter, by path: all linear ones but the head, those that share
    the embeddings' weight, and routers."""
    modules = {path: module for path, module in model.named_modules() if path}
    head = head_paths(model)
    return {p: m for p, m in modules.items() if features(m) and p not in head and not is_router(model, p)}


def left_out(model: nn.Module, spec: AdapterSpec) -> str | None:
    """One line about what ``all-linear`` leaves as it is in a mixture of experts; None where that is nothing.

    ``model`` may carry the adapter.
    """
    experts = fused_experts(model) if spec.all_linear else []
    if not experts:
        return None
    size = sum(p.numel() for path in experts for p in model.get_submodule(path).parameters(recurse=False))
    share = size / sum(p.numel() for p in model.parameters())
    return (
        f"all-linear leaves out every router and the experts of {len(experts)} layers, {share:.0%} of the parameters: "
        "one weight of three dimensions holds all experts of a layer, and no linear layer stands for it"
    )


def inject(model: nn.Module, spec: AdapterSpec, *, seed: int, strict: bool = True) -> Injection:
    """Freeze ``model`` and wrap the layers ``spec`` selects. :class:`InputError` leaves the model as it was."""
    targets, problems = find_targets(model, spec, strict=strict)
    if problems:
        raise InputError(problems)
    names = tuple(path for path, _ in model.named_modules() if path)
    base_total = sum(parameter.numel() for parameter in model.parameters())
    kind = DoRALinear if spec.use_dora else LoRALinear
    wrapped: dict[str, AdapterLayer] = {
        path: kind(
            layer,
            rank=spec.rank_for(path),
            scale=spec.scale_for(path),
            dropout=spec.dropout,
            generator=_generator(seed, path),
        )
        for path, layer in targets.items()
    }
    model.requires_grad_(False)
    for path, layer in wrapped.items():
        layer.train(layer.base.training)
        put_module(model, path, layer)
    trainable = sum(p.numel() for layer in wrapped.values() for p in layer.adapter_parameters().values())
    return Injection(spec, wrapped, names, trainable, base_total + trainable)


def remove(model: nn.Module) -> None:
    """Put the original layers (the same objects) back in place of every wrapper."""
    for path, layer in _wrappers(model):
        put_module(model, path, layer.base)


@contextlib.contextmanager
def disabled(target: nn.Module | Injection) -> Iterator[None]:
    """Run as the plain base: wrappers only pass through, bit for bit. For the whole model, not per thread."""
    if isinstance(target, Injection):
        layers = list(target.modules.values())
    else:
        layers = [layer for _, layer in _wrappers(target)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _wrappers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, AdapterLayer)]


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _generator(seed: int, path: str) -> torch.Generator:
    digest = blake3(f"{seed}:{path}".encode()).digest(length=8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def head_paths(model: nn.Module) -> set[str]:
    """The output head, and every layer that shares its weight with the input embeddings."""
    get_head, get_embeddings = (getattr(model, f"get_{side}_embeddings", lambda: None) for side in ("output", "input"))
    head, embeddings = get_head(), get_embeddings()
    shared = getattr(embeddings, "weight", None)
    return {
        path
        for path, module in model.named_modules()
        if module is head or (shared is not None and getattr(module, "weight", None) is shared)
    }


def _nothing_matches(where: str, name: str | Sequence[str], linear: list[str]) -> Problem:
    kinds = sorted({path.rpartition(".")[2] for path in linear})
    text = name if isinstance(name, str) else ", ".join(name)
    near = nearest(text, kinds) or nearest(text, linear)
    return Problem("no module matches", where, "one of " + shorten(", ".join(kinds), 300), repr(shorten(text)), near)


def _nothing_left(spec: AdapterSpec, linear: list[str]) -> Problem:
    unfiltered = any(spec.all_linear or named(spec.target_modules, path) for path in linear if not spec.excludes(path))
    if linear and (unfiltered or any(spec.excludes(path) for path in linear)):
        filters = "exclude_modules and layers_to_transform leave nothing of target_modules"
        return Problem(filters, "target_modules", fix="widen one of them")
    return _nothing_matches("target_modules", spec.target_modules, linear)


def _unused(spec: AdapterSpec, names: list[str], linear: list[str], targets: list[str]) -> list[Problem]:
    """Names, exclusions, patterns and layer indices that select nothing."""
    problems = []
    if not isinstance(spec.target_modules, str):
        for name in spec.target_modules:
            if not any(named((name,), path) for path in names):
                problems.append(_nothing_matches("target_modules", name, linear))
    excluded = spec.exclude_modules
    for item in (excluded,) if isinstance(excluded, str) else excluded:
        hits = item if isinstance(excluded, str) else (item,)
        if item and not any(named(hits, path) for path in names):
            problems.append(_nothing_matches("exclude_modules", item, linear))
    for where, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        keys = tuple(pattern)
        used = {pattern_key(keys, path) for path in targets}
        for key in keys:
            if key not in used:
                hidden = any(pattern_key((key,), path) for path in targets)
                why = "an earlier key matches first: order the keys from special to general" if hidden else ""
                problem = _nothing_matches(where, key, targets or linear)
                problems.append(
                    Problem("no target uses this key", where, problem.expected, problem.got, why or problem.fix)
                )
    present = {index for path in linear if (index := spec.layer_index(path)) is not None}
    for index in spec.layers_to_transform or ():
        if index not in present:
            expected = f"an index from {min(present)} to {max(present)}" if present else "a model with layers"
            problems.append(Problem("no such layer", "layers_to_transform", expected, str(index)))
    return problems
