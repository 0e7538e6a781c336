"""The base of a task: found, checked, hashed, with the renderer of its prompts and the device it will run on.

It does not load the base's weights; ``session`` does, when a step needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunegate.config import BaseSection, Config, TrainSection
from tunegate.data.render import Renderer
from tunegate.errors import InputError
from tunegate.kernels import native
from tunegate.kernels.formats import INT8, Recipe
from tunegate.model.bnb_files import quantized_names, stored_recipe
from tunegate.model.fingerprint import BaseFingerprint, fingerprint_base
from tunegate.model.loading import choose_dtype, eos_ids, load_tokenizer, longest_row
from tunegate.model.origin import origin_of
from tunegate.model.resolve import ResolvedBase, resolve_base
from tunegate.model.weights import TensorEntry, load_object, tensors_of
from tunegate.pipeline.reporter import Reporter


@dataclass(frozen=True)
class Base:
    """A base on disk, hashed, with its renderer. ``parameters`` counts tied tensors once; ``positions`` is the
    longest row its config allows, in tokens, None where the config does not say; ``recipe`` is how its weights are
    quantized when they are loaded, None if they are not; ``origin`` is what the base says it was made from."""

    resolved: ResolvedBase
    fingerprint: BaseFingerprint
    renderer: Renderer
    parameters: int
    positions: int | None
    compute_dtype: str
    dtype_reason: str
    recipe: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None

    def card(self) -> dict[str, Any]:
        said = {
            "name": self.resolved.name,
            "source": self.resolved.source,
            "revision": self.resolved.revision,
            "fingerprint": asdict(self.fingerprint),
            "parameters": self.parameters,
            "recipe": self.recipe,
        }
        return said if self.origin is None else {**said, "origin": self.origin}


def load_base(config: Config, reporter: Reporter, device: str) -> Base:
    """Find, check and hash the base; the weights stay on disk."""
    section = config.task.base
    resolved = resolve_base(
        base_name(config),
        section.revision,
        offline=section.offline,
        trust_remote_code=section.trust_remote_code,
        report=reporter.line,
    )
    fingerprint = fingerprint_base(resolved.path)
    tokenizer = load_tokenizer(resolved.path, trust_remote_code=section.trust_remote_code)
    renderer = Renderer(tokenizer, template=section.template, eos_ids=eos_ids(resolved.path))
    dtype, reason = choose_dtype(section.compute_dtype, device=device)
    entries = {e.name: e for part in tensors_of(resolved.path).values() for e in part}
    parameters = _count(entries)
    positions = longest_row(load_object(resolved.path / "config.json"))
    name = str(dtype).removeprefix("torch.")
    recipe, origin = _recipe(section, resolved.path, entries), origin_of(resolved.path, fingerprint.weights)
    return Base(resolved, fingerprint, renderer, parameters, positions, name, reason, recipe, origin)


def _recipe(section: BaseSection, folder: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """How the base's weights are quantized: as the task says, or as they are stored. :class:`InputError` if both."""
    stored = stored_recipe(names)
    if section.quantization == "none":
        return stored
    if stored:
        raise quantized_already(folder, f"weights stored in {stored['format']}")
    form = section.quantization
    four_bits = form != INT8  # which the other two settings are about
    recipe = Recipe(form, section.quantization_block, section.double_quantization) if four_bits else Recipe.of(form)
    return {**recipe.to_json(), "keep": sorted(set(section.keep_unquantized)), "stored": False}


def quantized_already(folder: Path, got: str) -> InputError:
    where, fix = f"base.quantization; {folder}", "remove `quantization`, or name the 16-bit original"
    return InputError("the base is stored quantized already", where=where, got=got, fix=fix)


def _count(entries: Mapping[str, TensorEntry]) -> int:
    """Parameters; a weight stored in 4 bits counts two for each byte of its codes, and scales count nothing."""
    stored = quantized_names(entries)
    parts = {name for weight in stored.values() for name in weight.tensor_names} - stored.keys()
    each = {name: weight.codes_per_byte for name, weight in stored.items()}
    return sum(each.get(n, 1) * _elements(e.shape) for n, e in entries.items() if n not in parts)


def base_name(config: Config) -> str:
    """The base's name, as a path where it is a folder beside the task file."""
    local = config.path(config.task.base.name)
    return str(local) if local.is_dir() else config.task.base.name


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def is_local(config: Config) -> bool:
    """Whether the base is looked for on this machine only."""
    return Path(base_name(config)).is_dir() or config.task.base.name.startswith((".", "/", "~"))


def keeps_16_bits(train: TrainSection, device: str) -> bool:
    """Whether a bf16 base that computes in fp32 keeps 16 bits in memory. Other trainers expect ``nn.Linear``, and
    without the CPU's kernels each product would widen its whole weight."""
    return train.backend == "native" and device.startswith("cpu") and native.library() is not None
