"""Exports for vLLM in a real vLLM, on the packaged base: the interpreter that TUNEGATE_VLLM_PYTHON names has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from task import call
from test_export_merge import peft_adapter
from tunegate.adapter.files import load_adapter
from tunegate.engine.runner import Runner
from tunegate.export.parity import InRunner
from tunegate.files import read_json
from tunegate.model.loading import load_model
from tunegate.model.resolve import resolve_base

PYTHON = os.environ.get("TUNEGATE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_base,
    pytest.mark.skipif(not PYTHON, reason="TUNEGATE_VLLM_PYTHON names no interpreter with vllm"),
]
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
TOKENS = 12
ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    model, adapter, prompt, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    llm = LLM(model, enable_lora=bool(adapter), max_lora_rank=8, max_model_len=256, max_num_seqs=4, dtype="float32",
              enforce_eager=True)
    how = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=5, ignore_eos=True)
    found = []
    for request in [None] + ([LoRARequest("adapter", 1, adapter)] if adapter else []):
        out = llm.generate([{"prompt_token_ids": prompt}], how, lora_request=request)[0].outputs[0]
        first = {str(t): p.logprob for t, p in out.logprobs[0].items()}
        found.append({"ids": list(out.token_ids), "first": first})
    print("FOUND " + json.dumps(found))
"""


def asked_of_vllm(model: Path, adapter: Path | None, scratch: Path) -> list[dict[str, Any]]:
    """Greedy answers of ``model`` and, if given, of ``adapter`` on it, with the first position's log-probabilities."""
    script = scratch / "ask.py"
    script.write_text(ASK)
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [PYTHON, script, model, adapter or "", json.dumps(PROMPT), str(TOKENS)],
        env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    line = next((text for text in done.stdout.splitlines() if text.startswith("FOUND ")), None)
    assert line is not None, done.stdout[-1500:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(line.removeprefix("FOUND "))
    return found


def asked_of_ours(base: Path, adapter: Path | None) -> tuple[list[int], torch.Tensor]:
    model = load_model(base, dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    subject = InRunner(Runner(model))
    return subject.answers([PROMPT], (), TOKENS)[0], subject.log_probs(PROMPT)[-1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_export_answers_in_vllm_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    """rsLoRA with ranks and alphas of its own, in vLLM a plain LoRA; DoRA, in vLLM the merged model, whose rounding to
    the base's bf16 is the export's, not vLLM's: the same greedy answer and distribution, and not the base's."""
    base = resolve_base("smollm2-135m-instruct").path
    odd = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}
    settings: dict[str, Any] = {"use_dora": True} if kind == "dora" else odd
    adapter, out = peft_adapter(base, tmp_path / "adapter", noise=0.1, **settings), tmp_path / "out"
    assert call("export", adapter, "--for", "vllm", "--base", base).code == (kind == "dora")
    said = call("export", adapter, "--to", "vllm", "-o", out, "--base", base)
    assert said.code == 0, said.err
    plain = asked_of_ours(base, None)
    if kind == "dora":
        found, wanted = asked_of_vllm(out, None, tmp_path), [asked_of_ours(out, None)]
    else:
        assert not read_json(out / "adapter_config.json")["rank_pattern"]
        found, wanted = asked_of_vllm(base, out, tmp_path), [plain, asked_of_ours(base, adapter)]
    for told, (ids, log_probs) in zip(found, wanted, strict=True):
        assert told["ids"] == ids and gap(told["first"], log_probs) < 0.05
    assert found[-1]["ids"] != plain[0] and gap(found[-1]["first"], plain[1]) > 1


def gap(first: dict[str, float], log_probs: torch.Tensor) -> float:
    """The largest difference in nats at the most likely tokens of the first position."""
    return max(abs(p - float(log_probs[int(t)])) for t, p in first.items())
