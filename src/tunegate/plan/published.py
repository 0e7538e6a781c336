"""Figures that others published, beside what this package predicts for the same inputs.

Each point states its inputs: model, adapter, tokens in memory, how activations and logits are held. Where the source
does not give one, the point says what was assumed. Nothing is fitted to a single point; the constants are those of
``memory`` and ``time`` for all of them. Points that report torch's own counters leave the CUDA context out.

The first group are rules that a planner must meet within 10 %; the others show where the model is off, and how far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tunegate.adapter.spec import AdapterSpec
from tunegate.plan.devices import PACKAGED, Device, load_sheet
from tunegate.plan.memory import PlanInputs, estimate
from tunegate.plan.shapes import ModelShape, llama_shape
from tunegate.plan.time import Workload, cost, even_rows, training_time

GB, GIB = 1e9, 2.0**30

LLAMA2_70B = llama_shape("Llama-2-70B", (80, 8192, 64, 8, 128, 28672, 32000))
LLAMA3_8B = llama_shape("Llama-3.1-8B", (32, 4096, 32, 8, 128, 14336, 128256))
LLAMA3_3B = llama_shape("Llama-3.2-3B", (28, 3072, 24, 8, 128, 8192, 128256), tied=True)
LLAMA2_7B = llama_shape("Llama-2-7B", (32, 4096, 32, 32, 128, 11008, 32000))
QWEN3_14B = llama_shape("Qwen3-14B", (40, 5120, 40, 8, 128, 17408, 151936))
QWEN3_32B = llama_shape("Qwen3-32B", (64, 5120, 64, 8, 128, 25600, 151936))

QUERY_VALUE = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Point:
    """A published figure: a value or a range (``low`` to ``high``) in ``unit``, and the prediction."""

    group: str
    what: str
    low: float
    high: float
    unit: str
    predicted: float
    inputs: str
    source: str

    @property
    def error(self) -> float:
        """Relative distance to the published figure; 0 inside a range."""
        return self.predicted / min(max(self.predicted, self.low), self.high) - 1

    @property
    def published(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "error": self.error}


def points() -> list[Point]:
    """Every point, the rules first."""
    memory = [*_torchtune(), *_peft(), *_litgpt(), *_llama_factory(), *_unsloth()]
    return [*rules_of_memory(), *rules_of_time(), *memory, *_speeds()]


def gpu_inputs(
    shape: ModelShape, tokens: int, *, rank: int = 16, modules: Any = "all-linear", **more: Any
) -> PlanInputs:
    """A run on a GPU in bf16 with adapters in 16 bits, as most stacks have them; ``more`` are further inputs."""
    targets = shape.targets(AdapterSpec(rank=rank, alpha=2.0 * rank, target_modules=modules)) if rank else ()
    given: dict[str, Any] = {
        "engine": "eager", "itemsize": 2, "adapter_itemsize": 2, "dropout": False,
        "loss": "whole", "loss_tokens": tokens,
    }  # fmt: skip
    return PlanInputs(shape=shape, targets=targets, tokens=tokens, **{**given, **more})


# --- rules -------------------------------------------------------------------------------------------------------


def seventy_billion() -> dict[str, PlanInputs]:
    """The three runs of the 70B rule: 2 rows of 2,048 tokens, rank 16 on every linear layer, everything trained in 16
    bits, layer inputs kept and the rest computed again."""
    lora = gpu_inputs(LLAMA2_70B, 4096, checkpointing="all", loss="chunks")
    full = replace(lora, method="full", targets=())
    return {"full": full, "lora": lora, "qlora": replace(lora, quantization="nf4")}


def derivation() -> PlanInputs:
    """The run behind "35 + 0.5 + 1 + 8". Its source names neither rank nor modules nor dtype. Adam is twice the
    gradients, so a moment is as wide as a gradient, and both figures mean 125 M parameters in fp32 (or 250 M in 16
    bits). QLoRA's rank (64, arXiv:2305.14314, table 9) and fp32 adapters and moments, on the modules that PEFT adapts
    by default in a Llama (q and v), give 131 M."""
    targets = LLAMA2_70B.targets(AdapterSpec(rank=64, alpha=16.0, target_modules=QUERY_VALUE))
    return replace(seventy_billion()["qlora"], targets=targets, adapter_itemsize=4)


def rules_of_memory() -> list[Point]:
    given = "Llama-2-70B, 2 x 2,048 tokens, 16-bit training, r=16 on all linear layers, inputs of layers kept"
    runs = seventy_billion()
    found = [
        _point("rule", f"70B {label}", value, estimate(runs[name]).total / GB, given, unit="GB")
        for name, label, value in (("full", "full", 600), ("lora", "LoRA r=16", 160), ("qlora", "QLoRA r=16", 48))
    ]
    p = derivation()
    q, trained = estimate(p), f"{p.trainable:,} in fp32 (r=64 on q and v)"
    pieces = (
        ("base", 35, q.of("weights", "constants"), "4 bits a weight, constants, 16-bit embeddings and head"),
        ("gradients", 0.5, q.of("gradients"), f"4 bytes x {trained}"),
        ("Adam", 1, q.of("optimizer"), f"2 x 4 bytes x {trained}"),
        ("activations", 8, q.of("activations", "layer at work", "dequantized"),
         "4,096 tokens: inputs of 80 layers, one layer at work, one matrix in 16 bits"),
        ("all of these, adapters and context", 48, q.total, "the derivation's run"),
    )  # fmt: skip
    found += [_point("rule", f"70B QLoRA: {n}", value, size / GB, how, unit="GB") for n, value, size, how in pieces]
    layer = 16 * (4096 + 4096)
    found.append(_point("rule", "trained share of a 4096 x 4096 layer", 0.78, 100 * layer / 4096**2, "r=16", unit="%"))
    return found


def _a100() -> Device:
    return replace(load_sheet(PACKAGED).named(["a100-80gb"])[0], on_demand=1.50)  # the rule's own price


def rules_of_time() -> list[Point]:
    """10,000 rows, three epochs, on one A100 80GB at 1.50 $ an hour."""
    device = _a100()
    rows = even_rows(10_000, 2048, 3, 16 * 2048)
    fast = gpu_inputs(LLAMA3_8B, 2048, checkpointing="none")
    plain = replace(fast, checkpointing="all")
    short = even_rows(10_000, 512, 3, 16 * 512)
    large = gpu_inputs(LLAMA2_70B, 2048, checkpointing="all", quantization="nf4")
    found = []
    for label, p, w, quick, hours, dollars, how in (
        ("8B fast", fast, rows, True, (2, 3), (3, 5), "2,048 tokens a row, nothing recomputed, no padding"),
        ("8B plain", plain, rows, False, (4, 6), (6, 9), "2,048 tokens a row, recomputed, plain kernels"),
        ("70B QLoRA", large, short, True, (8, 12), (12, 18), "512 tokens a row (assumed), recomputed, fused kernels"),
    ):
        time = training_time(p, w, device, fast=quick)
        money = cost(time.seconds, device)[0]
        assert money is not None
        found.append(Point("rule", f"{label}, 10k rows x 3", *hours, "h", time.hours, how, "project's rules"))
        found.append(Point("rule", f"{label}, price", *dollars, "$", money, "at 1.50 $ an hour", "project's rules"))
    return found


def _point(group: str, what: str, value: float, predicted: float, inputs: str, *, unit: str, source: str = "") -> Point:
    return Point(group, what, value, value, unit, predicted, inputs, source or "project's rules")


# --- published measurements ----------------------------------------------------------------------------------------


def _torch_total(p: PlanInputs, unit: float) -> float:
    """What torch's own counters see: no CUDA context."""
    return estimate(p).without("context").total / unit


def _torchtune() -> list[Point]:
    """https://github.com/pytorch/torchtune, README: batch of 2 rows packed to 2,048, compiled; and the 3.2 table:
    batch of 2 x 4,096 with every saving on. Its configs of that time: rank 8 on q and v, layer inputs kept, logits in
    eight chunks."""
    source = "torchtune README"
    given: dict[str, Any] = {"engine": "compiled", "loss": "chunks", "rank": 8, "modules": QUERY_VALUE}
    base = gpu_inputs(LLAMA3_8B, 4096, checkpointing="all", **given)
    none = replace(base, checkpointing="none")
    small = gpu_inputs(LLAMA3_3B, 8192, checkpointing="offload", **given)
    how = "2 x 2,048 tokens, compiled, r=8 on q and v, logits in 8 chunks"
    rows = (
        ("Llama-3.1-8B LoRA, RTX 4090", 16.2, base, how + ", inputs of layers kept"),
        ("Llama-3.1-8B QLoRA, RTX 4090", 7.4, replace(base, quantization="nf4"), how + ", inputs of layers kept"),
        ("Llama-3.1-8B LoRA, A6000", 30.3, none, how + ", nothing recomputed (assumed)"),
        ("Llama-3.2-3B LoRA, A100", 8.5, small, "2 x 4,096 tokens, compiled, inputs offloaded, logits in 8 chunks"),
        ("Llama-3.2-3B QLoRA, A100", 4.6, replace(small, quantization="nf4"), "as above, NF4"),
    )
    return [_point("memory", n, v, _torch_total(p, GIB), h, unit="GiB", source=source) for n, v, p, h in rows]


def _peft() -> list[Point]:
    """PEFT method_comparison/MetaMathQA (2026-07): rows of up to 768 tokens, batch of 4, L40S; rank 32 on q and v in
    fp32, nothing recomputed, full logits."""
    source = "PEFT method_comparison/MetaMathQA"
    lora = gpu_inputs(LLAMA3_3B, 4 * 768, rank=32, modules=QUERY_VALUE, adapter_itemsize=4)
    full = gpu_inputs(LLAMA3_3B, 4 * 768, rank=0, method="full")
    how = "4 x 768 tokens, r=32 on q and v (fp32), nothing recomputed, full logits"
    rows = (
        ("Llama-3.2-3B LoRA r=32, L40S", 22.3, lora, how),
        ("Llama-3.2-3B DoRA r=32, L40S", 24.5, replace(lora, method="dora"), how),
        ("Llama-3.2-3B full, L40S", 38.9, full, "4 x 768 tokens, 16-bit weights, gradients and moments"),
    )
    return [_point("memory", n, v, _torch_total(p, GB), h, unit="GB", source=source) for n, v, p, h in rows]


def _litgpt() -> list[Point]:
    """LitGPT config_hub/finetune: rows of up to 512 tokens, 1xA10G, rank 32 on q and v in bf16, nothing recomputed. Its
    peaks are of the longest rows; Alpaca's rarely reach 512."""
    base = gpu_inputs(LLAMA3_8B, 512, rank=32, modules=QUERY_VALUE, dropout=True)
    quantized = replace(base, quantization="nf4", double_quant=False, tokens=1024, loss_tokens=1024)
    how = "rows x 512 tokens, r=32 on q and v, nothing recomputed, full logits"
    rows = (("LoRA", 19.73, base, "1 " + how), ("QLoRA", 17.41, quantized, "2 " + how))
    source = "LitGPT config_hub/finetune"
    return [
        _point("memory", f"Llama-3-8B {n}, A10G", v, _torch_total(p, GB), h, unit="GB", source=source)
        for n, v, p, h in rows
    ]


def _llama_factory() -> list[Point]:
    """LLaMA-Factory's wiki (Performance comparison): batch of 4 rows of 1,024, rank 8 on all linear layers, inputs of
    layers kept, full logits. Its README's "estimated" table comes without inputs; assumed: one row of 1,024 tokens."""
    wiki = gpu_inputs(LLAMA2_7B, 4096, rank=8, checkpointing="all", adapter_itemsize=4)
    how = "4 x 1,024 tokens, r=8, inputs of layers kept, full logits"
    rows = [("Llama-2-7B LoRA, batch of 4", 18.0, wiki, how)]
    rows.append(("Llama-2-7B QLoRA, batch of 4", 9.0, replace(wiki, quantization="nf4"), how))
    thirty = llama_shape("LLaMA-30B", (60, 6656, 52, 52, 128, 17920, 32000))
    for name, shape, value in (
        ("7B", LLAMA2_7B, 6),
        ("14B", QWEN3_14B, 12),
        ("30B", thirty, 24),
        ("70B", LLAMA2_70B, 48),
    ):
        p = gpu_inputs(shape, 1024, rank=8, checkpointing="all", adapter_itemsize=4, quantization="nf4")
        rows.append((f"{name} QLoRA, estimated", value, p, f"{shape.name}, 1 x 1,024 tokens (assumed), r=8"))
    p = gpu_inputs(LLAMA2_7B, 1024, rank=8, checkpointing="all", adapter_itemsize=4)
    rows.append(("7B LoRA, estimated", 16, p, "Llama-2-7B, 1 x 1,024 tokens (assumed), r=8"))
    return [
        _point("memory", n, v, estimate(p).total / GB, h, unit="GB", source="LLaMA-Factory wiki, README")
        for n, v, p, h in rows
    ]


def _unsloth() -> list[Point]:
    """https://unsloth.ai/docs, requirements page: "absolute minimum" without inputs; assumed here: one row of 512
    tokens, rank 16 everywhere, layer inputs offloaded, loss in chunks."""
    source = "unsloth.ai requirements"
    rows = (
        ("3B", LLAMA3_3B, 3.5, 8), ("7B", LLAMA2_7B, 5, 19), ("8B", LLAMA3_8B, 6, 22), ("14B", QWEN3_14B, 8.5, 33),
        ("32B", QWEN3_32B, 26, 76), ("70B", LLAMA2_70B, 41, 164),
    )  # fmt: skip
    found = []
    for label, shape, quantized, plain in rows:
        p = gpu_inputs(shape, 512, engine="compiled", checkpointing="offload", loss="kernel", adapter_itemsize=4)
        how = f"{shape.name}, 1 x 512 tokens (assumed), inputs offloaded"
        four_bit = estimate(replace(p, quantization="nf4")).total / GB
        found.append(_point("memory", f"{label} QLoRA, minimum", quantized, four_bit, how, unit="GB", source=source))
        found.append(
            _point("memory", f"{label} LoRA, minimum", plain, estimate(p).total / GB, how, unit="GB", source=source)
        )
    return found


def _speeds() -> list[Point]:
    """Tokens a second. torchtune: as above. mlx-lm LORA.md: one row at a time, four adapted layers, M1 Max."""
    sheet = {d.name: d for d in load_sheet(PACKAGED).devices}
    base = gpu_inputs(LLAMA3_8B, 4096, checkpointing="all", engine="compiled", rank=8, modules=QUERY_VALUE)
    small = gpu_inputs(LLAMA3_3B, 8192, checkpointing="offload", engine="compiled", rank=8, modules=QUERY_VALUE)
    a6000 = Device("a6000", "cuda", 48 << 30, 154.8, 768)
    rows = (
        ("Llama-3.1-8B LoRA, RTX 4090", 3083, base, 2048, sheet["rtx-4090"]),
        ("Llama-3.1-8B QLoRA, RTX 4090", 2413, replace(base, quantization="nf4"), 2048, sheet["rtx-4090"]),
        ("Llama-3.1-8B LoRA, A6000", 4699, replace(base, checkpointing="none"), 2048, a6000),
        ("Llama-3.2-3B LoRA, A100", 8210, small, 4096, sheet["a100-80gb"]),
        ("Llama-3.2-3B QLoRA, A100", 8035, replace(small, quantization="nf4"), 4096, sheet["a100-80gb"]),
    )
    found = []
    for what, value, p, length, device in rows:
        w = Workload((length,) * 100, 1.0, 50)
        rate = training_time(p, w, device).tokens_per_second
        how = f"rows of {length:,}, {p.checkpointing} recomputed, {device.tflops:g} TFLOP/s"
        found.append(_point("speed", what, value, rate, how, unit="tokens/s", source="torchtune README"))
    return found
