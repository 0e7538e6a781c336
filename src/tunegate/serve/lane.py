"""An adapter in weights of its own, so that its rows cost what the base's rows cost: read, merged and proven.

:func:`read` adds the update to a copy of every layer that the adapter has, with the formulas of ``tunegate
merge``, in the dtype of the base's weights. Over 4-bit weights the copies have 16 bits: nothing is merged into a 4-bit
grid. :class:`Proof` are rows that go through the scheduler twice, on the factors and on the merged weights; the two
have to agree as a merge has to (:class:`~tunegate.export.parity.Limits`). They are the card's golden prompts, or tokens
spread over the vocabulary where there is no card.

It decides nothing about when rows run (``engine.scheduler``), and keeps nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tunegate.adapter.card import CARD, load_card
from tunegate.adapter.files import module_paths, tensor_name
from tunegate.adapter.layers import base_weight, is_conv1d
from tunegate.adapter.segmented import Identified, Merged, Served, require_key
from tunegate.engine.prompt_scores import PromptReader
from tunegate.engine.sampling import Chooser, Picking
from tunegate.engine.scheduler import Row
from tunegate.errors import InputError
from tunegate.export.deltas import Dense, Mix, Update, merged_rows
from tunegate.export.parity import Limits, Reading, compare
from tunegate.kernels.segments import Factors
from tunegate.kernels.stored import StoredLinear
from tunegate.serve.jobs import MERGED

PROOF_ROWS, PROOF_TOKENS = 4, 24
_ALONE = Mix("linear", (1.0,))
_UNMERGED = "serve it unmerged: leave it out of --merged"


@dataclass(frozen=True)
class Read:
    """An adapter's factors by column; where it is to run on merged weights also these, and prompts to prove them on."""

    factors: dict[int, Factors]
    merged: Merged | None = None
    prompts: tuple[tuple[int, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Of what is kept once it is proven."""
        return sum(f.nbytes for f in self.factors.values()) if self.merged is None else self.merged.nbytes


def read(served: Served, found: Identified, folder: Path, key: str, vocabulary: int) -> Read:
    """The adapter ``found`` in ``folder`` as the engine's ``key`` says; :class:`InputError` with everything that is
    wrong."""
    require_key(found, key.removesuffix(MERGED), folder)
    if not key.endswith(MERGED):
        return Read(found.factors)
    layers, unchanged = _merged(served, found)
    if unchanged:
        raise InputError(
            f"{len(unchanged)} layers come out of merging as they are in the base", where=str(folder),
            expected="changes that the base's dtype can store", got=", ".join(unchanged[:5]), fix=_UNMERGED,
        )  # fmt: skip
    return Read(found.factors, Merged(layers), prompts_of(folder, vocabulary))


def _merged(served: Served, found: Identified) -> tuple[dict[int, nn.Module], list[str]]:
    """The layers of ``found`` on merged weights, by column, and those of them that its update does not change."""
    state = found.state()
    layers, unchanged = {}, []
    for path in module_paths(state):
        wrapper = served.layers[path]
        parts = [state.get(tensor_name(path, name)) for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
        a, b, magnitude = parts
        assert a is not None and b is not None  # checked
        update = Update(a, b, found.spec.scale_for(path), magnitude)
        layers[wrapper.column], changed = merged_layer(wrapper.base, update, path)
        if not changed and (magnitude is not None or bool(b.any())):
            unchanged.append(path)
    return layers, unchanged


@torch.no_grad()
def merged_layer(base: nn.Module, update: Update, path: str) -> tuple[nn.Module, bool]:
    """``base`` with ``update`` in a weight of its own, and whether any value changed. The bias is the base's."""
    own, quantized = base_weight(base), callable(getattr(base, "dequantize", None))
    stored = torch.empty_like(own, dtype=torch.bfloat16) if quantized else torch.empty_like(base.weight)  # type: ignore[arg-type]
    matrix, changed = stored.t() if is_conv1d(base) else stored, False
    a, b, magnitude = (None if t is None else t.to(own.device) for t in (update.a, update.b, update.magnitude))
    assert a is not None and b is not None
    for rows, values in merged_rows(Dense(own), [Update(a, b, update.scale, magnitude)], _ALONE, path):
        if not torch.isfinite(values).all():
            raise InputError("a merged weight is not finite", where=path, fix="check the adapter")
        matrix[rows] = values.to(stored.dtype)
        changed |= not torch.equal(matrix[rows], own[rows].to(stored.dtype))
    weight = nn.Parameter(stored, requires_grad=False)
    if quantized:
        bias = getattr(base, "bias", None)
        return StoredLinear(weight, None if bias is None else nn.Parameter(bias, requires_grad=False)), changed
    layer = copy.copy(base)
    layer._parameters = {**base._parameters, "weight": weight}
    return layer, changed


class Proof:
    """Rows that show whether merged weights compute what the factors in ``slot`` do."""

    def __init__(self, read: Read, slot: int, folder: Path):
        self.folder, self.prompts = folder, read.prompts
        self._seen: dict[Row, list[Tensor]] = {}
        self._factors = [self._row(prompt, slot, None) for prompt in self.prompts]
        self._merged = [self._row(prompt, None, read.merged) for prompt in self.prompts]

    @property
    def rows(self) -> list[Row]:
        return [*self._seen]

    def _row(self, prompt: tuple[int, ...], slot: int | None, merged: Merged | None) -> Row:
        seen: list[Tensor] = []
        reader = PromptReader(len(prompt), lambda _first, logits: seen.append(logits.log_softmax(-1)))
        chooser = Chooser(Picking(temperature=0.0), prompt)
        row = Row(list(prompt), 1, chooser, frozenset(), slot, b"proof", merged, reader)
        self._seen[row] = seen
        return row

    def require(self, limits: Limits) -> None:
        """:class:`InputError` unless the two agree; all rows have been computed."""
        first, second = (
            Reading(self.prompts, tuple(torch.cat(self._seen[row]) for row in rows), self.prompts)
            for rows in (self._factors, self._merged)
        )
        found = compare(first, second)
        if found.mean_kl <= limits.mean_kl and found.agreement >= limits.agreement:
            return
        raise InputError(
            "on merged weights the adapter is not what it is on its base", where=str(self.folder),
            expected=f"mean KL at most {limits.mean_kl:g} nats, the same top token at {limits.agreement:.0%} or more",
            got=f"{found.mean_kl:.4g} nats (largest {found.max_kl:.4g}), {found.agreement:.1%} of {found.positions} "
            "positions", fix=_UNMERGED,
        )  # fmt: skip


def prompts_of(folder: Path, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """What a proof reads: the ends of the card's golden prompts, else tokens spread over the vocabulary."""
    golden = load_card(folder).template["golden"] if (folder / CARD).is_file() else ()
    own = [tuple(entry["ids"][-PROOF_TOKENS:]) for entry in golden[:PROOF_ROWS]]
    usable = tuple(ids for ids in own if len(ids) > 1 and max(ids) < vocabulary)
    if usable:
        return usable
    g = torch.Generator().manual_seed(0)
    return tuple(tuple(torch.randint(vocabulary, (PROOF_TOKENS,), generator=g).tolist()) for _ in range(PROOF_ROWS))
