"""Who is measured, and under which settings. A contestant that cannot run here is skipped with its reason.

``tunegate`` computes every row in full (``train.share_prefix: false``), because computing a shared system prompt once
is less work and not faster kernels; the headline ratios use it. ``tunegate, shared prefixes`` is the default of a run.

TRL's defaults are kept (gradient checkpointing on), but for the batch size, which is set to the same tokens a step,
and bf16 autocast, which is on only where the CPU has bf16 instructions: elsewhere it would only slow TRL down.
``TRL as shipped`` has it on everywhere. ``TRL tuned`` is without checkpointing, and with tcmalloc where it is found.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

import common


@dataclass(frozen=True)
class Contestant:
    name: str
    spec: dict[str, Any]
    tcmalloc: Literal["no", "where found", "needed"] = "no"
    quick: bool = True
    slow: bool = True
    needs: tuple[str, ...] = ()
    train: dict[str, Any] = field(default_factory=dict)

    def why_not(self) -> str:
        """Why it cannot run here; empty if it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed (pip install 'tunegate[bench]')"
        if self.tcmalloc == "needed" and common.tcmalloc() is None:
            return "no tcmalloc found (apt install libtcmalloc-minimal4, or set TUNEGATE_BENCH_TCMALLOC)"
        if self.spec["kind"] == "tunegate" and self.spec.get("quantization"):
            from tunegate.config import BaseSection

            if "quantization" not in BaseSection.model_fields:
                return "this version of tunegate has no base.quantization"
        return ""


def catalogue() -> list[Contestant]:
    """Everyone, in the order of a round."""
    bf16 = common.has_bf16()
    own = "bfloat16" if bf16 else "float32"
    other = "float32" if bf16 else "bfloat16"
    peft, trl = ("peft", "transformers"), ("trl", "peft", "datasets")
    full = {"share_prefix": False}
    return [
        Contestant("tunegate", {"kind": "tunegate", "dtype": own}, slow=False, train=full),
        Contestant("tunegate, shared prefixes", {"kind": "tunegate", "dtype": own}, slow=False),
        Contestant("tunegate nf4", {"kind": "tunegate", "dtype": own, "quantization": "nf4"}, slow=False, train=full),
        Contestant("TRL", {"kind": "trl", "dtype": "float32", "trl": {"bf16": bf16}}, needs=trl),
        Contestant(
            "TRL tuned",
            {"kind": "trl", "dtype": "float32", "trl": {"bf16": bf16, "gradient_checkpointing": False}},
            tcmalloc="where found",
            quick=False,
            needs=trl,
        ),
        Contestant(
            "TRL packing tuned",
            {
                "kind": "trl",
                "dtype": "float32",
                "trl": {"bf16": bf16, "gradient_checkpointing": False, "packing": True},
            },
            tcmalloc="where found",
            quick=False,
            needs=trl,
        ),
        Contestant("TRL as shipped", {"kind": "trl", "dtype": "float32"}, quick=False, needs=trl),
        Contestant(f"PEFT {own}", {"kind": "peft", "dtype": own}, needs=peft),
        Contestant(f"PEFT {other}", {"kind": "peft", "dtype": other}, quick=False, needs=peft),
        Contestant(f"PEFT {own} + tcmalloc", {"kind": "peft", "dtype": own}, tcmalloc="needed", needs=peft),
        Contestant(
            "PEFT bitsandbytes NF4",
            {"kind": "peft", "dtype": own, "quantization": "nf4"},
            tcmalloc="where found",
            quick=False,
            needs=(*peft, "bitsandbytes"),
        ),
    ]


def qlora() -> list[Contestant]:
    """NF4 with double quantization by tunegate and by PEFT on bitsandbytes, each with kept and with recomputed
    activations, and PEFT under tcmalloc."""
    own = "bfloat16" if common.has_bf16() else "float32"
    nf4, recompute = {"dtype": own, "quantization": "nf4"}, {"gradient_checkpointing": True}
    full, needs = {"share_prefix": False}, ("peft", "transformers", "bitsandbytes")
    return [
        Contestant("tunegate", {"kind": "tunegate", **nf4}, slow=False, train=full),
        Contestant("PEFT", {"kind": "peft", **nf4}, needs=needs),
        Contestant("tunegate recomputing", {"kind": "tunegate", **nf4}, slow=False, train={**full, **recompute}),
        Contestant("PEFT recomputing", {"kind": "peft", **nf4}, needs=needs, train=recompute),
        Contestant("PEFT + tcmalloc", {"kind": "peft", **nf4}, tcmalloc="needed", quick=False, needs=needs),
    ]


@dataclass
class Score:
    """What one contestant's repetitions gave."""

    contestant: Contestant
    runs: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    @property
    def tokens_per_second(self) -> dict[str, Any]:
        return common.summary([sum(run["tokens"]) / sum(run["seconds"]) for run in self.runs])

    @property
    def rss_gb(self) -> dict[str, Any]:
        return common.summary([run["rss"] / 2**30 for run in self.runs])

    @property
    def rss_beyond_torch_gb(self) -> dict[str, Any]:
        return common.summary([(run["rss"] - run["rss_after_torch"]) / 2**30 for run in self.runs])

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.contestant.name, "spec": self.contestant.spec, "skipped": self.reason}
        if self.runs:
            found |= {
                "tokens_per_second": self.tokens_per_second,
                "rss_gb": self.rss_gb,
                "rss_beyond_torch_gb": self.rss_beyond_torch_gb,
                "runs": self.runs,
            }
        return found


def measure(contestant: Contestant, common_spec: dict[str, Any], steps: tuple[int, int]) -> dict[str, Any]:
    """One repetition. ``steps`` are the timed steps of a fast and of a slow contestant. One that takes a quarter of
    an hour (bf16 on a CPU without bf16 instructions) is given up."""
    train = {**common_spec.get("train", {}), **contestant.train}
    spec = {**common_spec, **contestant.spec, "train": train, "steps": steps[contestant.slow]}
    preload = None if contestant.tcmalloc == "no" else common.tcmalloc()
    return common.run_worker(spec, preload=preload, timeout=900)
