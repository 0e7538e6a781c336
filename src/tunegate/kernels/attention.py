"""Causal attention over a flat run of tokens in which rows end and begin, without padding the model.

A :class:`Layout` says where the rows of a run lie; row 0 may be a prefix that every other row sees, so that a
system prompt shared by all rows is computed once (exactly: its hidden states are the same for every row, and its
gradient is the sum over the rows). For the attention product alone, rows of similar length are gathered into
small padded groups; everything else in the model runs on the flat tokens.

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
    query_index: Tensor  # (rows, Lq) token of each query; padding repeats the row's first token
    prefix: int  # keys every row begins with: tokens 0 to prefix
    key_index: Tensor  # (rows, Lk - prefix) the row's own keys
    query_position: Tensor  # (rows, Lq)
    key_position: Tensor  # (rows, Lk); padding has a position no query reaches
    plain_causal: bool  # one length, no prefix: SDPA's own causal mask will do


class Plan:
    """A :class:`Layout` turned into gather indices and masks, built once per batch and used by every layer.

    With ``cached_prefix`` the prefix's keys and values come from an earlier pass: queries start after the prefix,
    keys still begin with it.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", *, cached_prefix: bool = False):
        grouped = _similar(layout.lengths, layout.prefix)
        if cached_prefix:
            grouped = grouped[1:]
        skipped = layout.prefix if cached_prefix else 0
        self.groups = [self._group(layout, rows, skipped, device) for rows in grouped]
        order = torch.empty(layout.tokens, dtype=torch.long)
        offset = 0
        for rows in grouped:
            longest = max(layout.lengths[r] for r in rows)
            for slot, row in enumerate(rows):
                start, length = layout.starts[row], layout.lengths[row]
                order[start : start + length] = offset + slot * longest + torch.arange(length)
            offset += len(rows) * longest
        self.scatter = order[skipped:].to(device)  # token -> its place in the groups' outputs laid end to end
        self._masks: dict[tuple[int, int | None], Tensor] = {}

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
            prefix=prefix,
            key_index=index.to(device),
            query_position=query_position.to(device),
            key_position=torch.cat([before, key_position], dim=1).to(device),
            plain_causal=prefix == 0 and bool(real.all()),
        )

    def mask(self, index: int, window: int | None) -> Tensor:
        """(rows, 1, Lq, Lk) bool, True where query may see key; ``window`` counts the token itself."""
        key = (index, window)
        if key not in self._masks:
            group = self.groups[index]
            ahead = group.query_position[:, :, None] - group.key_position[:, None, :]
            seen = ahead >= 0
            if window is not None:
                seen &= ahead < window
            self._masks[key] = seen[:, None]
        return self._masks[key]


def _similar(lengths: Sequence[int], prefix: int) -> list[list[int]]:
    """Rows in groups of similar length; the prefix row is a group of its own, rows keep a fixed order."""
    groups: list[list[int]] = [[0]] if prefix else []
    rest = sorted(range(1 if prefix else 0, len(lengths)), key=lambda r: (-lengths[r], r))
    longest = 0
    for row in rest:
        if not longest or lengths[row] < PADDING_ALLOWED * longest:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


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

    ``query`` is (T, H, D), ``key`` and ``value`` (T, Hkv, D) with Hkv dividing H; returns (T, H, D). ``softcap`` c
    turns scores s into c*tanh(s/c), as in Gemma 2.
    """
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


def _gather(tokens: Tensor, group: _Group) -> Tensor:
    """(S, Hkv, D) to the group's (rows, Lk, Hkv, D).

    The prefix is expanded, not indexed: its gradient is then a sum with a fixed order, where indexing would add the
    rows up in whatever order threads reach them, and no two runs would end in the same bytes.
    """
    own = tokens[group.key_index]
    if not group.prefix:
        return own
    return torch.cat([tokens[: group.prefix].expand(len(own), -1, -1, -1), own], dim=1)


def _spread(heads: Tensor, wanted: int) -> Tensor:
    """(B, Hkv, L, D) repeated to (B, wanted, L, D)."""
    return heads if heads.shape[1] == wanted else heads.repeat_interleave(wanted // heads.shape[1], dim=1)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


@dataclass
class DecodeStore:
    """Keys and values of one layer while rows are being generated.

    ``prefix_key``/``prefix_value`` are (P, Hkv, D), shared by all rows; ``key``/``value`` are
    (rows, Hkv, capacity, D), of which each row has filled its first ``length`` places.
    """

    prefix_key: Tensor
    prefix_value: Tensor
    key: Tensor
    value: Tensor

    def keep(self, rows: Tensor) -> DecodeStore:
        """The store of ``rows`` alone."""
        return DecodeStore(self.prefix_key, self.prefix_value, self.key[rows], self.value[rows])


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

    ``query`` is (B, H, D); ``lengths`` (B,) counts each row's own keys, the query's included. Returns (B, H, D).
    """
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
        return (own.softmax(-1, dtype=torch.float32).to(q.dtype) @ store.value[:, :, :used]).reshape(rows, heads, dim)
    weights = torch.cat([before, own], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
    shared = weights[..., :prefix].transpose(0, 1).reshape(kv_heads, -1, prefix)
    out = (shared @ store.prefix_value.transpose(0, 1)).view(kv_heads, rows, -1, dim).transpose(0, 1)
    return (out + weights[..., prefix:] @ store.value[:, :, :used]).reshape(rows, heads, dim)
