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
def _silence() -> Any:
    """llama.cpp tells of every buffer on standard error; what it cannot do it also returns."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi = get_ffi()
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    get_lib().llama_log_set(quiet, ffi.NULL)
    return quiet


class LlamaCpp:
    """``model`` with, if given, the GGUF adapter ``lora``; ``context`` is the longest row in tokens."""

    def __init__(self, model: Path, context: int, lora: Path | None = None, threads: int | None = None):
        from llama_cpp_py_sync import Llama

        where = str(model)
        _silence()
        try:
            self._llama = Llama(
                where, n_ctx=context, n_batch=context, n_threads=threads, type_k="f32", type_v="f32", use_mmap=False
            )
        except RuntimeError as error:
            raise TunegateError("llama.cpp cannot load this file", where=where, got=str(error)) from error
        self._lib, self._ffi, self._context = self._llama._lib, self._llama._ffi, self._llama._ctx
        self._lib.llama_set_embeddings(self._context, False)
        if lora is not None:
            adapter = self._lib.llama_adapter_lora_init(self._llama._model, str(lora).encode())
            if adapter == self._ffi.NULL:
                raise TunegateError("llama.cpp cannot load this adapter", where=str(lora))
            self._adapters = self._ffi.new("struct llama_adapter_lora *[1]", [adapter])
            self._scales = self._ffi.new("float[1]", [1.0])
            self._lib.llama_set_adapters_lora(self._context, self._adapters, 1, self._scales)

    def tokens(self, text: str) -> list[int]:
        """``text`` as the file's vocabulary splits it, control tokens recognised and nothing added."""
        return list(self._llama.tokenize(text, add_special=False, parse_special=True))

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        return [self._answer(list(prompt), set(stop_ids), new_tokens) for prompt in prompts]

    def _answer(self, prompt: list[int], stop_ids: set[int], new_tokens: int) -> list[int]:
        found: list[int] = []
        logits = self._run(prompt, 0, 1)
        while (token := int(logits[-1].argmax())) not in stop_ids:
            found.append(token)
            if len(found) == new_tokens:
                break
            logits = self._run([token], len(prompt) + len(found) - 1, 1)
        return found

    def log_probs(self, row: Sequence[int]) -> Tensor:
        return torch.log_softmax(self._run(list(row), 0, POSITIONS), -1)

    def _run(self, ids: list[int], past: int, wanted: int) -> Tensor:
        """Logits of the last ``wanted`` of ``ids``, which stand behind ``past`` tokens that were run before."""
        if past == 0:
            self._llama._clear_context_state()
        first, size = max(0, len(ids) - wanted), self._llama.n_vocab
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
