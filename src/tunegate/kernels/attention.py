"""Causal attention over a flat run of tokens in which rows end and begin, without padding the model.

A :class:`Layout` says where the rows of a run lie; row 0 may be a prefix that every other row sees, so that a
system prompt shared by all rows is computed once (exactly: its hidden states are the same for every row, and its
gradient is the sum over the rows). The native kernels (:mod:`~tunegate.kernels.varlen`) take the rows as they lie.
On CUDA flash attention takes them end to end (:mod:`~tunegate.kernels.gpu`). Where neither runs, the twin gathers rows
of similar length into small padded groups for the attention product alone; everything else in the model runs on the
flat tokens.

Decoding attends one new token a row over a :class:`DecodeStore`: keys and values of the shared prefix, kept once,
and of each row. The two parts meet in one softmax.

No dropout on attention weights, no bidirectional or cross attention, no attention sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from tunegate.kernels import gpu, varlen

PADDING_ALLOWED = 0.7  # a group takes rows down to this share of its longest; less costs calls, more costs padding


@dataclass(frozen=True)
class Layout:
    """Rows of a flat run, one after the other. With ``prefix > 0``, row 0 has that length and all rows see it."""

    lengths: tuple[int, ...]
    prefix: int = 0

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.lengths) or (self.prefix and self.lengths[0] != self.prefix):
            raise ValueError(f"bad layout: lengths {self.lengths[:5]}..., prefix {self.prefix}")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> list[int]:
        """The position of every token in its own sequence, prefix included."""
        result: list[int] = []
        for row, length in enumerate(self.lengths):
            first = 0 if row == 0 else self.prefix
            result.extend(range(first, first + length))
        return result


@dataclass(frozen=True)
class _Group:
    query_index: Tensor  # (rows, L) token of each query; padding repeats the row's first token
    key_index: Tensor  # (rows, L) tokens of the rows' own keys
    query_position: Tensor  # (rows, L)
    key_position: Tensor  # (rows, prefix + L); padding has a position no query reaches
    prefix: int  # keys of the shared prefix in front of the rows' own
    plain_causal: bool  # one length, no prefix: SDPA's own causal mask will do


class Plan:
    """A :class:`Layout` turned into what attention needs, built once per batch and used by every layer.

    The native kernels need where rows begin; the twin's gather indices and masks are made when it first asks.
    With ``cached_prefix`` the prefix's keys and values come from an earlier pass: queries start after the prefix,
    keys still begin with it.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", *, cached_prefix: bool = False):
        if cached_prefix and not layout.prefix:
            raise ValueError("cached_prefix needs a layout with a prefix")
        self.layout = layout
        self.device = device
        self.skipped = layout.prefix if cached_prefix else 0
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    @cached_property
    def rows(self) -> varlen.Rows:
        """What the native kernels need."""
        starts = torch.tensor([*self.layout.starts, self.layout.tokens])
        return varlen.Rows(starts, self.layout.prefix, self.skipped)

    @cached_property
    def sequences(self) -> gpu.Sequences:
        """What the kernels of a GPU need."""
        return gpu.sequences(self.layout.lengths, self.layout.prefix, self.skipped, self.device)

    @cached_property
    def _grouped(self) -> list[list[int]]:
        grouped = _with_prefix(self.layout)
        return grouped[1:] if self.skipped else grouped

    @cached_property
    def groups(self) -> list[_Group]:
        return [self._group(self.layout, rows, self.skipped, self.device) for rows in self._grouped]

    @cached_property
    def scatter(self) -> Tensor:
        """Token to its place in the groups' outputs laid end to end."""
        layout = self.layout
        order = torch.empty(layout.tokens, dtype=torch.long)
        offset = 0
        for rows in self._grouped:
            longest = max(layout.lengths[r] for r in rows)
            for slot, row in enumerate(rows):
                start, length = layout.starts[row], layout.lengths[row]
                order[start : start + length] = offset + slot * longest + torch.arange(length)
            offset += len(rows) * longest
        return order[self.skipped :].to(self.device)

    @staticmethod
    def _group(layout: Layout, rows: Sequence[int], skipped: int, device: torch.device | str) -> _Group:
        prefix = 0 if rows[0] == 0 else layout.prefix  # the prefix itself has no prefix, and is a group of its own
        longest = max(layout.lengths[r] for r in rows)
        start = torch.tensor([layout.starts[r] for r in rows])[:, None]
        length = torch.tensor([layout.lengths[r] for r in rows])[:, None]
        own = torch.arange(longest)[None, :]
        real = own < length
        index = torch.where(real, start + own, start)
        position = own + prefix
        key_position = torch.where(real, position, torch.iinfo(torch.long).max // 2)
        query_position = torch.where(real, position, prefix)
        before = torch.arange(prefix)[None, :].expand(len(rows), -1)
        return _Group(
            query_index=(index - skipped).to(device),
            key_index=index.to(device),
            query_position=query_position.to(device),
            key_position=torch.cat([before, key_position], dim=1).to(device),
            prefix=prefix,
            plain_causal=prefix == 0 and bool(real.all()),
        )

    def mask(self, index: int, window: int | None) -> Tensor:
        """(rows, 1, L, prefix + L) bool, True where query may see key; ``window`` counts the token itself."""
        key = (index, window)
        if key not in self._masks:
            group = self.groups[index]
            ahead = group.query_position[:, :, None] - group.key_position[:, None, :]
            seen = ahead >= 0
            if window is not None:
                seen &= ahead < window
            self._masks[key] = seen[:, None]
        return self._masks[key]


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of ``lengths`` in groups of similar length, the longest first; equal lengths keep their order."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if not groups or lengths[row] < PADDING_ALLOWED * longest:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


def _with_prefix(layout: Layout) -> list[list[int]]:
    """The layout's rows in groups of similar length; the prefix is a group of its own, the first."""
    if not layout.prefix:
        return similar_lengths(layout.lengths)
    return [[0], *([row + 1 for row in group] for group in similar_lengths(layout.lengths[1:]))]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every token over its own row (and the prefix), up to itself.

    ``query`` is (T, H, D), ``key`` (T, Hkv, D), ``value`` (T, Hkv, Dv) with Hkv dividing H; returns (T, H, Dv).
    ``softcap`` c turns scores s into c*tanh(s/c), as in Gemma 2.
    """
    if varlen.supports(query, key, value):
        return _native_attention(query, key, value, plan, scale, window, softcap)
    if query.is_cuda and gpu.takes(library := gpu.attention_library(), query, key, value, softcap):
        return gpu.attention(library, query, key, value, plan.sequences, scale, window, softcap)
    outputs = []
    for index, group in enumerate(plan.groups):
        q = query[group.query_index].transpose(1, 2)  # (B, H, Lq, D)
        k = _spread(_gather(key, group).transpose(1, 2), q.shape[1])
        v = _spread(_gather(value, group).transpose(1, 2), q.shape[1])
        causal = group.plain_causal and window is None
        if softcap is not None:
            out = _softcapped(q, k, v, plan.mask(index, window), scale, softcap)
        elif causal:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask(index, window), scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B*Lq, H, D)
    return torch.cat(outputs)[plan.scatter]


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Through the op where a gradient may be asked for; its bookkeeping costs as much as some short rows."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, _ = varlen.varlen_attention(
            query,
            key,
            value,
            plan.rows.starts,
            plan.rows.prefix,
            plan.rows.skipped,
            scale,
            window or -1,
            softcap or 0.0,
        )
        return out
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    varlen.attention_forward(query, key, value, plan.rows, varlen.Options(scale, window, softcap), out=out, lse=lse)
    return out


def _gather(flat: Tensor, group: _Group) -> Tensor:
    """(T, Hkv, D) to (rows, prefix + L, Hkv, D).

    The prefix is expanded, not indexed: torch adds the gradients of an index that occurs twice in the order its
    threads arrive, and the same seed would not give the same bytes. (Padding occurs twice too, with gradient zero.)
    """
    own = flat[group.key_index]
    if not group.prefix:
        return own
    return torch.cat([flat[: group.prefix].expand(len(own), -1, -1, -1), own], dim=1)


def _spread(heads: Tensor, wanted: int) -> Tensor:
    """(B, Hkv, L, D) repeated to (B, wanted, L, D)."""
    each = wanted // heads.shape[1]
    return heads if each == 1 else heads[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


@dataclass
class DecodeStore:
    """Keys and values of one layer while rows are being generated.

    ``prefix_key``/``prefix_value`` are (P, Hkv, D) and (P, Hkv, Dv), shared by all rows; ``key``/``value`` are
    (rows, Hkv, capacity, D or Dv), of which each row has filled its first ``length`` places.
    """

    prefix_key: Tensor
    prefix_value: Tensor
    key: Tensor
    value: Tensor


def _dense(store: DecodeStore) -> bool:
    """Whether keys lie as the native kernel reads them: places of a row one after the other."""
    own = (store.key, store.value)
    return (
        all(x.stride(-1) == 1 and x.stride(2) == x.shape[-1] for x in own)
        and all(x.stride(-1) == 1 and x.dtype == store.key.dtype for x in (store.prefix_key, store.prefix_value))
        and store.prefix_key.device.type == "cpu"
    )


def decode_attention(
    query: Tensor,
    store: DecodeStore,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One query a row over the shared prefix and the row's own keys.

    ``query`` is (B, H, D); ``lengths`` (B,) counts each row's own keys, the query's included. Returns (B, H, Dv).
    Natively where the kernels take the tensors and no gradient is asked for.
    """
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, store.key, store.value))
    if not wants_gradient and varlen.supports(query, store.key, store.value) and _dense(store):
        query = query if query.stride(-1) == 1 else query.contiguous()
        out = query.new_empty(*query.shape[:2], store.value.shape[-1])
        places = varlen.Places(torch.arange(len(query))[:, None], lengths, store.key.shape[2])  # a row is a page
        prefix_parts, own_parts = (store.prefix_key, store.prefix_value), (store.key, store.value)
        varlen.decode(query, prefix_parts, own_parts, places, varlen.Options(scale, window, softcap), out=out)
        return out
    rows, heads, dim = query.shape
    prefix, kv_heads = store.prefix_key.shape[0], store.key.shape[1]
    used = int(lengths.max())
    q = query.view(rows, kv_heads, heads // kv_heads, dim) * scale
    own = q @ store.key[:, :, :used].transpose(-1, -2)  # (B, Hkv, G, used)
    place = torch.arange(used, device=query.device)[None, :]
    hidden = place >= lengths[:, None]
    if window is not None:
        hidden |= place < lengths[:, None] - window
    if prefix:
        flat = q.permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)
        before = flat @ store.prefix_key.permute(1, 2, 0)  # (Hkv, B*G, P)
        before = before.view(kv_heads, rows, -1, prefix).transpose(0, 1)
        if softcap is not None:
            before = torch.tanh(before / softcap) * softcap
        if window is not None:
            out_of_reach = torch.arange(prefix, device=query.device)[None, :] < lengths[:, None] + prefix - window
            before = before.masked_fill(out_of_reach[:, None, None, :], float("-inf"))
    if softcap is not None:
        own = torch.tanh(own / softcap) * softcap
    own = own.masked_fill(hidden[:, None, None, :], float("-inf"))
    if not prefix:
        return (own.softmax(-1, dtype=torch.float32).to(q.dtype) @ store.value[:, :, :used]).reshape(rows, heads, -1)
    weights = torch.cat([before, own], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
    shared = weights[..., :prefix].transpose(0, 1).reshape(kv_heads, -1, prefix)
    out = shared @ store.prefix_value.transpose(0, 1)  # (Hkv, B*G, Dv)
    out = out.view(kv_heads, rows, -1, out.shape[-1]).transpose(0, 1)
    return (out + weights[..., prefix:] @ store.value[:, :, :used]).reshape(rows, heads, -1)
