"""What a deployment consists of: servers, what each serves, from where, and how much memory it takes.

Three kinds. ``merged``: one model with one adapter in its weights, no adapter at run time. ``multi``: one base, many
adapters, one server. ``separate``: a server for each adapter, for adapters of different bases or where one must not
wait for another. Memory comes from ``plan``'s formulas: the weights as the engine keeps them, the caches as they are
limited, two processes; a tenth is left free. Base and adapters are folders that are mounted read-only, or names that
the server fetches at its start: packaged, hub, registry.

Secrets are named and never held: an API key, a registry's address with a password. A file of keys stays where it is,
and the servers see its changes. ``deploy_files`` writes the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tunegate.errors import InputError, Problem, nearest
from tunegate.plan.memory import RUNTIME, Part, PlanInputs, weight_bytes
from tunegate.plan.shapes import ModelShape, Packing

Kind = Literal["merged", "multi", "separate"]
KINDS: tuple[Kind, ...] = ("merged", "multi", "separate")
TARGETS = ("systemd", "docker", "compose", "kubernetes")
FREE = 0.10  # of the memory, beside what is counted
WORKING_TOKENS = 2048  # of one pass
KEY, REGISTRY, KEY_NAME = "TUNEGATE_API_KEY", "TUNEGATE_REGISTRY", "api-key"
PORT = 8000
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # what DNS, systemd and compose all take
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")


@dataclass(frozen=True)
class Source:
    """``name`` as clients ask for it (a base: as its users call it), ``where`` a folder, or a name to fetch."""

    name: str
    where: str

    @property
    def folder(self) -> Path | None:
        """The folder that is mounted; None for what the server fetches."""
        path = Path(self.where).expanduser()
        return path.absolute() if path.is_dir() else None


@dataclass(frozen=True)
class Sizes:
    """Bytes of the KV cache and of the adapters in RAM, rows of a batch, cores; ``quantization`` of the base."""

    kv_cache: int = 1 << 30
    adapter_cache: int = 1 << 30
    rows: int = 64
    cpus: float = 2.0
    quantization: Packing | None = None
    context: int | None = None


@dataclass(frozen=True)
class Server:
    """One server: its unit's name, its base and adapters, its port on the host, and the parts of its memory."""

    name: str
    base: Source
    adapters: tuple[Source, ...]
    port: int
    sizes: Sizes
    memory: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """What it takes at most."""
        return sum(part.bytes for part in self.memory)

    @property
    def limit_mib(self) -> int:
        """Its memory limit: a tenth more, in whole units of 64 MiB."""
        return 64 * math.ceil(self.bytes * (1 + FREE) / (64 << 20))

    @property
    def request_mib(self) -> int:
        """What it holds for certain: all of it is used once the caches are full."""
        return math.ceil(self.bytes / (1 << 20))


@dataclass(frozen=True)
class Deployment:
    """``registry``: where the registry is, None without one; a URL is a secret's, a folder is mounted. ``image``: the
    tag of what the Dockerfile makes; ``replicas`` of each server (Kubernetes). ``keys``: the file of keys that all
    servers ask for, in place of one key; ``merged``: names of adapters that run on weights of their own."""

    kind: Kind
    name: str
    servers: tuple[Server, ...]
    registry: str | None = None
    image: str = "tunegate:local"
    replicas: int = 1
    allow_ungated: bool = False
    keys: Path | None = None
    merged: tuple[str, ...] = ()

    @property
    def registry_folder(self) -> Path | None:
        path = Path(self.registry).expanduser() if self.registry else None
        return path.absolute() if path is not None and path.is_dir() else None

    @property
    def secrets(self) -> tuple[str, ...]:
        """Environment variables that whoever runs it has to fill."""
        registry = (REGISTRY,) if self.registry and self.registry_folder is None else ()
        return registry if self.keys else (KEY, *registry)


def plan_deployment(
    kind: Kind, base: str | None, adapters: Sequence[tuple[str, str]], shapes: Sequence[ModelShape], sizes: Sizes,
    *, name: str = "tunegate", port: int = PORT, bases: Sequence[str] = (), deployment: Deployment | None = None,
) -> Deployment:  # fmt: skip
    """The servers of a deployment. ``shapes``: of each server's base, one for all or one each; ``bases``: of each
    adapter for ``separate``, where they differ. :class:`InputError` with everything that is wrong."""
    deployment = deployment or Deployment(kind, name, ())
    problems = _problems(kind, base, adapters, bases, name)
    problems += _merged_problems(kind, deployment.merged, [n for n, _ in adapters])
    if deployment.replicas > 1 and deployment.registry_folder is not None:
        fix = "a registry on PostgreSQL (docs/registry.md), or one replica"
        problems.append(
            Problem("a registry that is a folder is for one machine", "--replicas", "1", str(deployment.replicas), fix)
        )
    if problems:
        raise InputError(problems)
    sources = [Source(n, where) for n, where in adapters]
    parts: list[tuple[str, str | None, tuple[Source, ...]]] = [(name, base, tuple(sources))]
    if kind == "separate":
        names = [f"{name}-{unit_name(s.name)}" for s in sources]
        each: list[str | None] = [*bases] or [base] * len(sources)
        parts = [(n, b, (s,)) for n, b, s in zip(names, each, sources, strict=True)]
    every = list(shapes) * len(parts) if len(shapes) == 1 else list(shapes)
    servers = []
    for number, ((unit, model, own), shape) in enumerate(zip(parts, every, strict=True)):
        merged = [one.name for one in own if one.name in deployment.merged]
        mine = sizes if own else replace(sizes, adapter_cache=0)
        source = Source(name if kind == "merged" else "base", str(model))
        servers.append(Server(unit, source, own, port + number, mine, memory_of(shape, mine, len(merged))))
    return replace(deployment, kind=kind, name=name, servers=tuple(servers))


def unit_name(text: str) -> str:
    """A name as DNS, systemd and compose take it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _problems(
    kind: Kind, base: str | None, adapters: Sequence[tuple[str, str]], bases: Sequence[str], name: str
) -> list[Problem]:
    found = []
    if kind not in KINDS:
        found.append(Problem("no such kind", got=kind, expected=", ".join(KINDS), fix=nearest(kind, KINDS)))
    if not _NAME.fullmatch(name):
        found.append(Problem("not a name for units", "--name", "small letters, digits and -, at most 40", name))
    if not base and not bases:
        found.append(Problem("what do the servers load?", "--base", "a packaged name, a folder or a hub id"))
    if kind == "merged" and adapters:
        fix = "`tunegate merge ADAPTER -o FOLDER`, then --base FOLDER; or the kind `multi`"
        found.append(Problem("a merged model has its adapter in it", "--adapter", "none", adapters[0][0], fix))
    if kind != "merged" and not adapters:
        found.append(Problem(f"`{kind}` without an adapter", "--adapter", "NAME=SOURCE"))
    names = [n for n, _ in adapters]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        found.append(Problem("a name is given twice", "--adapter", got=", ".join(twice)))
    units = [unit_name(n) for n in names]
    if kind == "separate" and len(set(units)) < len(units) and not twice:
        found.append(Problem("two adapters would give units of one name", "--adapter", got=", ".join(names)))
    if bases and len(bases) != len(adapters):
        got = f"{len(bases)} bases, {len(adapters)} adapters"
        found.append(Problem("a base for each adapter, or one for all", "--base", got=got))
    found += [
        Problem("a password would stand in the files", "--adapter", got=n, fix=f"a reference, and {REGISTRY}")
        for n, where in adapters
        if _PASSWORD.search(where)
    ]
    return found


def _merged_problems(kind: Kind, merged: Sequence[str], names: Sequence[str]) -> list[Problem]:
    if merged and kind == "merged":
        return [Problem("a merged model has its adapter in it already", "--merged", "none", merged[0])]
    return [
        Problem("no adapter of this name", "--merged", got=name, fix=nearest(name, names))
        for name in merged
        if name not in names
    ]


def memory_of(shape: ModelShape, sizes: Sizes, merged: int = 0) -> tuple[Part, ...]:
    """The parts of a server's memory, in bytes. ``merged``: adapters on weights of their own, whose size is that of all
    linear layers: an adapter may have fewer."""
    inputs = PlanInputs(shape, (), WORKING_TOKENS, sizes.rows, quantization=sizes.quantization)
    weights, constants = weight_bytes(inputs)
    copied = 2 if sizes.quantization else min(inputs.itemsize, shape.stored)
    width = 3 * shape.intermediate + 4 * shape.hidden
    working = 4 * (WORKING_TOKENS * width + sizes.rows * shape.vocab)
    how = f"{shape.parameters:,} parameters" + (
        f", linear layers in {sizes.quantization}" if sizes.quantization else ""
    )
    parts = (
        Part("weights", weights + constants, how),
        Part("merged", merged * shape.linear * copied, f"{merged} x {shape.linear:,} weights of linear layers"),
        Part("KV cache", sizes.kv_cache, "as it is limited"),
        Part("adapters", sizes.adapter_cache, "in RAM, as they are limited"),
        Part("working", working, f"a pass of {WORKING_TOKENS:,} tokens, logits of {sizes.rows} rows"),
        Part("engine", round(RUNTIME), "Python, torch, transformers"),
        Part("front", round(RUNTIME), "Python, tokenizers, HTTP"),
    )
    return tuple(part for part in parts if part.bytes)


def serve_command(
    deployment: Deployment, server: Server, *, host: str, port: int, base: str, adapters: Sequence[str],
    keys: str | None,
) -> list[str]:  # fmt: skip
    """The arguments behind ``tunegate``: ``base``, ``adapters`` and ``keys`` as the server sees them."""
    sizes = server.sizes
    line = ["serve", base, "--base-name", server.base.name]
    for source, where in zip(server.adapters, adapters, strict=True):
        line += ["--adapter", f"{source.name}={where}"]
        line += ["--merged", source.name] if source.name in deployment.merged else []
    if deployment.registry:
        line.append("--registry")  # which one, TUNEGATE_REGISTRY says
    line += ["--host", host, "--port", str(port)]
    line += ["--keys", keys] if keys else ["--api-key-env", KEY]
    line += ["--kv-cache", str(sizes.kv_cache), "--max-rows", str(sizes.rows)]
    if server.adapters:
        line += ["--adapter-cache", str(sizes.adapter_cache)]
    line += ["--quantization", sizes.quantization] if sizes.quantization else []
    line += ["--max-context", str(sizes.context)] if sizes.context else []
    line += ["--threads", str(max(1, math.floor(sizes.cpus)))]
    return [*line, *(["--allow-ungated"] if deployment.allow_ungated else [])]
