"""A GGUF file in llama.cpp itself, as a subject of the parity report.

The library is reached through ``llama-cpp-py-sync``, whose wheels hold a compiled llama.cpp with bindings generated for
it. Everything of the file is used: keys, tensors and, for :meth:`LlamaCpp.tokens`, the vocabulary. Keys and values of
the attention are kept in fp32, so what differs is the file and llama.cpp's own arithmetic (activations rounded to the
weights' format).

It is optional: :func:`available` says whether it is installed and its library loads here. It runs on the CPU, one row
at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunegate.errors import TunegateError
from tunegate.export.parity import POSITIONS
from tunegate.export.readers import Feed, greedy


@cache
def available() -> bool:
    if importlib.util.find_spec("llama_cpp_py_sync") is None:
        return False
    from llama_cpp_py_sync._cffi_bindings import get_lib

    try:
        get_lib()
    except (RuntimeError, OSError):  # a wheel for a newer C library, for one
        return False
    return True


@cache
def _library() -> tuple[Any, Any, Any]:
    """Its functions, its types, and the logger that keeps llama.cpp from telling of every buffer on standard error."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    lib, ffi = get_lib(), get_ffi()
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    lib.llama_log_set(quiet, ffi.NULL)
    lib.llama_backend_init()
    return lib, ffi, quiet


class LlamaCpp:
    """``model`` with, if given, the GGUF adapter ``lora``; ``context`` is the longest row in tokens."""

    def __init__(self, model: Path, context: int, lora: Path | None = None):
        self._lib, self._ffi, _ = _library()
        self._model = self._context = None
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._found(self._lib.llama_model_load_from_file(str(model).encode(), params), "file", model)
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0
        self._context = self._found(self._lib.llama_init_from_model(self._model, settings), "model", model)
        if lora is not None:
            adapter = self._found(self._lib.llama_adapter_lora_init(self._model, str(lora).encode()), "adapter", lora)
            self._adapters = self._ffi.new("struct llama_adapter_lora *[1]", [adapter])
            self._scales = self._ffi.new("float[1]", [1.0])
            self._lib.llama_set_adapters_lora(self._context, self._adapters, 1, self._scales)

    def _found(self, pointer: Any, what: str, path: Path) -> Any:
        if pointer == self._ffi.NULL:
            raise TunegateError(f"llama.cpp cannot load this {what}", where=str(path))
        return pointer

    def __del__(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)

    def tokens(self, text: str) -> list[int]:
        """``text`` as the file's vocabulary splits it, control tokens recognised and nothing added."""
        data = text.encode("utf-8")
        room = len(data) + 16
        ids = self._ffi.new(f"llama_token[{room}]")
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, True)
        return [int(ids[i]) for i in range(count)]

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        return [greedy(self._feed(), prompt, stop_ids, new_tokens) for prompt in prompts]

    def _feed(self) -> Feed:
        past = 0

        def feed(ids: Sequence[int]) -> Tensor:
            nonlocal past
            found = self._run(list(ids), past, 1)
            past += len(ids)
            return found

        return feed

    def log_probs(self, row: Sequence[int], last: int = POSITIONS) -> Tensor:
        return torch.log_softmax(self._run(list(row), 0, last), -1)

    def _run(self, ids: list[int], past: int, wanted: int) -> Tensor:
        """Logits of the last ``wanted`` of ``ids``, which stand behind ``past`` tokens that were run before."""
        if past == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        first, size = max(0, len(ids) - wanted), self._lib.llama_vocab_n_tokens(self._vocabulary)
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, past + i, 1, 0
                batch.logits[i] = int(i >= first)
            code = self._lib.llama_decode(self._context, batch)
            if code != 0:
                raise TunegateError("llama.cpp cannot run this row", got=f"llama_decode gave {code}")
            rows = [self._logits(i, size) for i in range(first, len(ids))]
        finally:
            self._lib.llama_batch_free(batch)
        return torch.stack(rows)

    def _logits(self, position: int, size: int) -> Tensor:
        pointer: Any = self._lib.llama_get_logits_ith(self._context, position)
        return torch.frombuffer(bytearray(self._ffi.buffer(pointer, 4 * size)), dtype=torch.float32)
