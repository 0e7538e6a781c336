"""A stand-in for vLLM, in the same places: a package ``vllm`` with metadata, started by the same command line.

``install`` writes it to a folder for PYTHONPATH. It answers /health, /v1/models, /metrics, /v1/completions (streamed,
token ids) and the routes for adapters as vLLM 0.32 does, in the forms that were recorded from a real one. Its "model"
counts up: each next token is the last one plus a step, 1 for the base and the first digit of the hash plus 2 for an
adapter. What it was asked is written to ``requests.jsonl`` beside it. FAKE_VLLM_* make it fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"


def install(folder: Path, version: str = "0.32.0") -> Path:
    """The folder for PYTHONPATH."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").write_text("")
    (package / "api_server.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(METADATA.format(version=version))
    return folder


class Server(ThreadingHTTPServer):
    daemon_threads = True
    adapters: dict[str, str]
    options: argparse.Namespace


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"message": message, "type": "X", "param": None, "code": status}})

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}":
            return True
        self.reply(401, {"error": "Unauthorized"})
        return False

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.reply(200, "")
        if self.path == "/metrics":
            lines = [
                'vllm:cache_config_info{block_size="128",num_gpu_blocks="728"} 1.0',
                'vllm:num_requests_running{engine="0",model_name="base"} 2.0',
                'vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25',
                'vllm:generation_tokens_total{engine="0",model_name="base"} 10.0',
                'vllm:generation_tokens_total{engine="1",model_name="base"} 5.0',
            ]
            return self.reply(200, "\n".join(lines) + "\n")
        if self.allowed():
            self.reply(200, {"data": [{"id": "base", "max_model_len": 2048}, {"id": "a", "max_model_len": None}]})
        return None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Path("requests.jsonl").open("a") as log:
            log.write(json.dumps({"path": self.path, **body}) + "\n")
        if not self.allowed():
            return None
        adapters = self.server.adapters
        if self.path == "/v1/load_lora_adapter":
            config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
            if config["r"] > self.server.options.max_lora_rank:
                return self.refuse(500, f"LoRA rank {config['r']} is greater than max_lora_rank")
            adapters[body["lora_name"]] = body["lora_path"]
            return self.reply(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            return self.reply(200 if adapters.pop(body["lora_name"], None) else 404, "")
        if body["model"] != "base" and body["model"] not in adapters:
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        step = 1 if body["model"] == "base" or os.environ.get("FAKE_VLLM_INERT") else 2 + int(body["model"][3], 16)
        if not body.get("stream"):
            tops = [{f"token_id:{p[-1] + step}": -0.5, "token_id:0": -3.0} for p in body["prompt"]]
            return self.reply(200, {"choices": [{"logprobs": {"top_logprobs": [top]}} for top in tops]})
        return self.stream(body, step)

    def stream(self, body: dict[str, Any], step: int) -> None:
        if body["max_tokens"] + len(body["prompt"]) > 2048:
            return self.refuse(400, "max_tokens cannot be greater than max_model_len")
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        token = body["prompt"][-1]
        for number in range(body["max_tokens"]):
            token += step
            stopped = token in body["stop_token_ids"]
            reason = "stop" if stopped else "length" if number + 1 == body["max_tokens"] else None
            choice: dict[str, Any] = {
                "index": 0, "text": "x", "logprobs": None, "finish_reason": reason,
                "stop_reason": token if stopped else None, "token_ids": [token],
            }  # fmt: skip
            if "logprobs" in body:  # the chosen one first, then by rank, one more than asked for
                top = {f"token_id:{token}": -2.0, "token_id:7": -0.25, "token_id:9": -1.0}
                name = f"token_id:{token}"
                choice["logprobs"] = {"tokens": [name], "token_logprobs": [-2.0], "top_logprobs": [top]}
            self.event({"choices": [choice]})
            if os.environ.get("FAKE_VLLM_DIES") and number == 1:
                os._exit(9)
            if reason:
                break
            time.sleep(0.01)
        usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": 3}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def event(self, value: dict[str, Any]) -> None:
        try:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()
        except OSError:
            Path("aborted").touch()
            raise


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "served-model-name", "host", "dtype", "generation-config", "logprobs-mode",
                 "structured-outputs-config", "chat-template"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("port", "max-num-seqs", "max-logprobs", "tensor-parallel-size", "pipeline-parallel-size",
                 "max-lora-rank", "max-loras", "max-cpu-loras", "max-model-len", "kv-cache-memory-bytes"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int)
    for name in ("enable-lora", "enable-prefix-caching", "enable-prompt-tokens-details", "disable-uvicorn-access-log"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if os.environ.get("FAKE_VLLM_BROKEN"):
        sys.exit("ValueError: no such architecture")
    child = os.fork() if os.environ.get("FAKE_VLLM_FORKS") else 1
    if child == 0:  # one that a worker of vLLM stands for
        Path("forked").write_text(str(os.getpid()))
        time.sleep(240)
        os._exit(0)
    threading.Timer(240, lambda: os._exit(0)).start()  # a forgotten one ends
    server = Server((options.host, options.port), Handler)
    server.adapters, server.options = {}, options
    server.serve_forever()


if __name__ == "__main__":
    main()
