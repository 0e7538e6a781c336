"""An export for vLLM in a real vLLM, on the packaged base: the interpreter that TUNEGATE_VLLM_PYTHON names has it."""

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
from tunegate.adapter.inject import remove
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
ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    base, adapter, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(base, enable_lora=True, max_lora_rank=8, max_model_len=256, max_num_seqs=4, dtype="bfloat16",
              enforce_eager=True, kv_cache_memory_bytes=1 << 28)
    how = SamplingParams(temperature=0.0, max_tokens=12, logprobs=5)
    found = []
    for request in (None, LoRARequest("odd", 1, adapter)):
        out = llm.generate([{"prompt_token_ids": prompt}], how, lora_request=request)[0].outputs[0]
        first = {str(t): p.logprob for t, p in out.logprobs[0].items()}
        found.append({"ids": list(out.token_ids), "first": first})
    print("FOUND " + json.dumps(found))
"""


def first_token(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    return found


def test_an_export_acts_in_vllm_as_it_was_trained(tmp_path: Path) -> None:
    """rsLoRA with ranks and alphas of its own, in vLLM a plain LoRA: the same distribution, and not the base's."""
    base = resolve_base("smollm2-135m-instruct").path
    adapter = peft_adapter(
        base, tmp_path / "adapter", noise=0.05, use_rslora=True, rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 3},
    )  # fmt: skip
    assert call("export", adapter, "--for", "vllm", "--base", base).code == 0
    said = call("export", adapter, "--to", "vllm", "-o", tmp_path / "out", "--base", base)
    assert said.code == 0, said.err
    assert not read_json(tmp_path / "out" / "adapter_config.json")["rank_pattern"]
    model = load_model(base, dtype=torch.float32)
    wanted = [first_token(model)]
    load_adapter(model, adapter)
    wanted.append(first_token(model))
    remove(model)
    del model
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [PYTHON, script, base, tmp_path / "out", json.dumps(PROMPT)],
        env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    line = next((text for text in done.stdout.splitlines() if text.startswith("FOUND ")), None)
    assert line is not None, done.stdout[-1500:] + done.stderr[-3000:]
    plain, odd = json.loads(line.removeprefix("FOUND "))
    for told, right, wrong in ((plain, *wanted), (odd, *wanted[::-1])):
        far = [max(abs(p - float(w[int(t)])) for t, p in told["first"].items()) for w in (right, wrong)]
        assert far[0] < 0.3 and far[0] < far[1] / 3, far  # bf16 against fp32
    assert plain["ids"] != odd["ids"]
