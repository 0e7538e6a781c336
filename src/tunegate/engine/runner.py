"""A frozen causal model made callable on flat batches.

The model definition stays transformers' own. Its attention layers are pointed, through transformers' attention
interface, at :func:`tunegate.kernels.attention`; which rows exist and what they see travels with the call as an
"attention pass", so nothing is stored in the model. The output head is applied apart, at target positions only.

Two paths exist, and a probe decides which at construction by comparing with the untouched model's logits on a few
tokens: ``packed`` (no padding, shared prefixes) wherever the model takes it, ``padded`` (one row per line, the
model's own attention) for anything else. A model for which neither reproduces the logits is refused.

It does not compute gradients by hand and does not choose a dtype; the weights come as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunegate.data.pack import Batch, make_batch
from tunegate.data.types import Rendered
from tunegate.engine.fused import FusedLayers, Partial, PassState
from tunegate.engine.fused_shape import window_of
from tunegate.engine.liger import LigerLayers, Operations, operations
from tunegate.engine.positions import long_above, position_table, rows_of
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.kernels import (
    Head,
    Layout,
    Plan,
    attention,
    gpu,
    linear_cross_entropy,
    native,
    similar_lengths,
    target_log_probs,
)

ATTENTION = "tunegate_packed"
IGNORED = {"position_ids", "use_cache", "cache_position", "position_embeddings", "dropout", "is_causal"}


class AttentionPass(Protocol):
    """What a forward pass does at every attention layer. Tensors are (T, heads, D).

    ``fused`` is the fused layers' own: what they share during the pass.
    """

    fused: PassState | None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor: ...


class PackedPass:
    """Attention inside the rows of a layout. Optionally keeps each layer's keys and values."""

    def __init__(self, plan: Plan, *, keep: bool = False):
        self.plan = plan
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.fused: PassState | None = None
        self.partial: Partial | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if self.kept is not None:
            self.kept[layer] = (k.clone(), v.clone())  # what comes in may lie in memory that is used again
        return attention(q, k, v, self.plan, scale=scale, window=window, softcap=softcap)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_pass: AttentionPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, Hkv, T, D)."""
    unknown = {name for name, value_ in others.items() if value_ is not None} - IGNORED
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention arguments {sorted(unknown) or ['attention_mask']}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    # Some architectures put the window into the mask alone (Qwen2-MoE), and a probe of a few tokens is shorter than any
    # real window, so what the call states is held against the config.
    if sliding_window != window_of(getattr(module, "config", None), layer):
        raise NotImplementedError(f"a window of layer {layer} that its attention call does not state")
    out = attention_pass.attend(layer, q, k, v, scale, sliding_window, softcap)
    return out[None], None


class Runner:
    """``model`` with its head split off, callable on :class:`~tunegate.data.pack.Batch`."""

    def __init__(self, model: Any):
        self.model = model
        self.backbone: nn.Module = model.base_model
        self.device: torch.device = next(model.parameters()).device
        self.context = position_table(model.config.get_text_config())
        self.long_above = long_above(model.config.get_text_config())
        with torch.no_grad():  # what it computes in: some of its weights may be stored in less
            self.dtype = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device=self.device)).dtype
        self.fused: FusedLayers | None = None
        self.path, self.path_reason = self._choose_path()

    @property
    def head(self) -> Head:
        """Asked for anew each time: an adapter may wrap the head after the runner was made."""
        return _find_head(self.model)

    @property
    def shares_prefix(self) -> bool:
        """Whether batches with a shared prefix can be run."""
        return self.path == "packed"

    def check_fit(self, rows: Iterable[tuple[str, int]]) -> None:
        """:class:`InputError` if a row (name, tokens) is longer than the base's table of positions."""
        if self.context is None:
            return
        problems = [
            Problem(
                "the row is longer than the base can read",
                name,
                f"at most {self.context:,} tokens",
                f"{length:,}",
                f"`data.max_tokens: {self.context}` with `data.on_long_row: truncate` or `skip`",
            )
            for name, length in rows
            if length > self.context
        ]
        if problems:
            raise InputError(problems)

    def is_long(self, tokens: int) -> bool:
        """Whether a row of so many tokens takes the base's second set of rotary frequencies (LongRoPE)."""
        return self.long_above is not None and tokens > self.long_above

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden state of every token of the run, (T, hidden)."""
        layout = batch.layout
        own = layout.lengths[bool(layout.prefix) :]
        self.check_fit(zip(batch.row_ids, (layout.prefix + n for n in own), strict=True))
        long = [self.is_long(layout.prefix + n) for n in own]
        if not any(long) or all(long):
            return self._hidden(batch.ids, batch.positions, layout)
        # the model rotates a whole call by its longest row: one call for the short rows and one for the long ones
        parts = [rows_of(layout, [n for n, is_long in enumerate(long) if is_long == kind]) for kind in (False, True)]
        found = torch.cat([self._hidden(batch.ids[index], batch.positions[index], rows) for index, rows in parts])
        order = torch.cat([index for index, _ in parts]).argsort(stable=True)
        second = layout.prefix + len(parts[0][0])  # of a shared prefix the short rows' states are taken
        return found[order[(order < len(parts[0][0])) | (order >= second)].to(found.device)]

    def _hidden(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        if self.path == "packed":
            return self.run(ids, positions, PackedPass(Plan(layout, self.device)))
        return self._padded(ids, layout)

    def run(self, ids: Tensor, positions: Tensor, attention_pass: AttentionPass) -> Tensor:
        """The backbone over a flat run (packed path): (T,) ids to (T, hidden)."""
        output = self.backbone(
            input_ids=ids[None].to(self.device),
            position_ids=positions[None].to(self.device),
            use_cache=False,
            attention_pass=attention_pass,
        )
        return output.last_hidden_state[0]

    def _padded(self, flat: Tensor, layout: Layout) -> Tensor:
        if layout.prefix:
            raise ValueError("the padded path takes batches without a shared prefix")
        rows = flat.split(list(layout.lengths))
        hidden: list[Tensor] = [flat] * len(rows)
        for group in similar_lengths(layout.lengths):
            ids = nn.utils.rnn.pad_sequence([rows[r] for r in group], batch_first=True).to(self.device)
            lengths = torch.tensor([layout.lengths[r] for r in group], device=self.device)
            real = torch.arange(ids.shape[1], device=self.device)[None, :] < lengths[:, None]
            output = self.backbone(input_ids=ids, attention_mask=real.long(), use_cache=False)
            for row, state in zip(group, output.last_hidden_state, strict=True):
                hidden[row] = state[: len(rows[row])]
        return torch.cat(hidden)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the batch's targets, nats, fp32 scalar."""
        hidden = self.hidden(batch)[batch.predictors.to(self.device)]
        return linear_cross_entropy(hidden, batch.labels.to(self.device), self.head)

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probability of every target, (N,) fp32 nats, on the CPU."""
        hidden = self.hidden(batch)[batch.predictors.to(self.device)]
        return target_log_probs(hidden, batch.labels.to(self.device), self.head).cpu()

    # --- which path ---------------------------------------------------------------------------------------------

    def _choose_path(self) -> tuple[str, str]:
        packed = self._try_packed()
        if packed is None:
            return "packed", "its attention runs on flat batches; " + self._try_fused()
        self.path = "padded"
        try:
            difference = self._probe_difference(self._probe_reference(), shared=False)
            got = f"{difference:.3g}" if not difference <= self._tolerance() else ""
        except TunegateError:
            raise
        except Exception as error:  # model code: anything can happen in it
            got = f"{type(error).__name__}: {error}"
        if got:
            raise InputError(
                "this architecture is not understood: hidden states and head do not give the model's own logits",
                where=type(self.model).__name__,
                expected=f"relative difference below {self._tolerance():g}",
                got=got,
                fix="use a plain decoder-only causal language model (Llama, Qwen, Mistral, Gemma, Phi, GPT-2, ...)",
            )
        return "padded", packed

    def _try_packed(self) -> str | None:
        """None if the packed path reproduces the model's logits, else the reason why not."""
        from transformers import AttentionInterface

        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be replaced"
        AttentionInterface.register(ATTENTION, _packed_attention)
        before = self.model.config._attn_implementation
        if before == ATTENTION:  # an earlier runner's: its attention runs on flat batches only
            before = "sdpa" if self.model._supports_sdpa else "eager"
            self.model.set_attn_implementation(before)
        self.path = "packed"
        try:
            reference = self._probe_reference()
            self.model.set_attn_implementation(ATTENTION)
            difference = self._probe_difference(reference, shared=True)
            reason = None if difference <= self._tolerance() else f"packed logits differ by {difference:.2g}"
        except TunegateError:
            raise
        except Exception as error:  # model code: anything can happen in it; the reason is shown at start
            reason = f"its attention needs more than flat batches give ({type(error).__name__}: {error})"
        if reason is not None:
            self.model.set_attn_implementation(before)
        return reason

    def _try_fused(self) -> str:
        """Replace the decoder layers where that reproduces the packed logits; says how it went."""
        if self.device.type == "cuda":
            return f"attention by {gpu.attention_library().name}, {self._try_liger(operations())}"
        if self.device.type != "cpu" or native.library() is None:
            return f"no fused layers ({'not on the CPU' if self.device.type != 'cpu' else native.describe()[1]})"
        fused = FusedLayers(self.backbone)
        if not fused.shapes:
            return fused.describe()
        difference = self._installed(fused)
        if difference is not None:
            return f"no fused layers (logits differ by {difference:.2g})"
        self.fused = fused
        return fused.describe()

    def _try_liger(self, found: Operations | str) -> str:
        """Liger's kernels in the layers where that reproduces the packed logits; says how it went."""
        if isinstance(found, str):
            return found
        layers = LigerLayers(self.backbone, found)
        if not layers.shapes:
            return "no layer that Liger's kernels fit"
        try:
            difference = self._installed(layers)
        except TunegateError:
            raise
        except Exception as error:  # Triton compiles at the first call; the reason is shown at start
            return f"no Liger kernels ({type(error).__name__}: {error})"
        return layers.describe() if difference is None else f"no Liger kernels (logits differ by {difference:.2g})"

    def _installed(self, layers: FusedLayers | LigerLayers) -> float | None:
        """Install ``layers``; None if the logits stay. Else they are taken out again, and the difference comes back."""
        with torch.no_grad(), _eval_mode(self.model):
            reference = self.head.logits(self.hidden(self._probe_batch(share_prefix=False)))
            layers.install()
            try:
                difference = self._probe_difference(reference, shared=True)
            except BaseException:
                layers.remove()
                raise
        if difference <= self._tolerance():
            return None
        layers.remove()
        return difference

    def _tolerance(self) -> float:
        return 1e-3 if self.dtype == torch.float32 else 5e-2

    def _probe_rows(self) -> list[Tensor]:
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (19,), generator=torch.Generator().manual_seed(0))
        return [row[: self.context] for row in (torch.cat([ids[:5], ids[5:9]]), torch.cat([ids[:5], ids[9:19]]))]

    def _probe_batch(self, *, share_prefix: bool) -> Batch:
        rows = [Rendered("probe", tuple(r.tolist()), (False,) * (len(r) - 1) + (True,)) for r in self._probe_rows()]
        return make_batch(rows, share_prefix=share_prefix)

    @torch.no_grad()
    def _probe_reference(self) -> Tensor:
        rows = self._probe_rows()
        with _eval_mode(self.model):
            return torch.cat([self.model(input_ids=row[None].to(self.device)).logits[0].float() for row in rows])

    @torch.no_grad()
    def _probe_difference(self, reference: Tensor, *, shared: bool) -> float:
        with _eval_mode(self.model):
            worst = self._distance(self.head.logits(self.hidden(self._probe_batch(share_prefix=False))), reference)
            if shared:
                run = self._probe_batch(share_prefix=True)
                prefix = run.layout.prefix
                first = prefix + run.layout.lengths[1]
                order = [*range(first), *range(prefix), *range(first, run.layout.tokens)]
                worst = max(worst, self._distance(self.head.logits(self.hidden(run)[order]), reference))
        return worst

    @staticmethod
    def _distance(got: Tensor, wanted: Tensor) -> float:
        if not bool(torch.isfinite(wanted).all()):
            raise TunegateError("the base gives NaN or infinite logits", fix="check its files, or its compute_dtype")
        return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


evaluating = _eval_mode


def _find_head(model: Any) -> Head:
    """The output head and what the architecture does around it; the probe proves the guess."""
    module = model.get_output_embeddings()
    if module is None:
        raise InputError("the model has no output head", where=type(model).__name__, expected="a causal language model")
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return Head(module, scale, getattr(config, "final_logit_softcapping", None))
