"""A tokenizer as GGUF's keys: tokens, their kinds, merges or scores, the pre-tokenizer's name, special ids, template.

Two kinds are written. Byte-level BPE (``gpt2`` in GGUF) holds merges, and the name of the rule that splits text before
merging; llama.cpp knows such rules by name only, so the rule of ``tokenizer.json`` is looked up by what it is and
refused where no name is known. SentencePiece's BPE (``llama``) holds scores instead of merges: the piece with the
highest score is formed first, so a piece's score is minus the rank of the first merge that forms it.

The end of a turn that the adapter was trained on becomes ``eot_token_id`` where it is not the eos token, so that
generation stops there. The chat template is the one of training.

Source: llama.cpp's ``conversion/base.py`` and ``src/llama-vocab.cpp`` (b11739). Unigram and WordPiece are not written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunegate.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PRE_TOKENIZERS = {
    ("bytes split",): "gpt-2",
    ("digits", "bytes split"): "smollm",
    (_CONTRACTIONS + r"\p{L}+|\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{L}+|\p{N}" + _REST, "bytes"): "qwen2",
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "bytes",
    ): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything GGUF says about a tokenizer. ``pre`` and ``merges`` belong to ``gpt2``, ``scores`` to ``llama``."""

    model: str
    tokens: list[str]
    kinds: list[int]
    pre: str
    merges: list[str]
    scores: list[float]
    space_prefix: bool | None
    add_bos: bool
    ids: Mapping[str, int]
    template: str | None


def vocabulary(renderer: Any, size: int, where: str) -> Vocabulary:
    """The tokenizer and template of ``renderer``, with ``size`` tokens: as many as the embedding has rows.

    :class:`InputError` for a tokenizer that llama.cpp does not know by a name used here.
    """
    tokenizer = renderer.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _unknown("the tokenizer is of another kind", "BPE", model["type"], where)
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, spec, size, pieces, where)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ids = {
        name: int(found)
        for name in ("bos", "eos", "unk", "pad")
        if (found := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    if renderer.has_template and renderer.end_of_turn_id != ids.get("eos"):
        ids["eot"] = renderer.end_of_turn_id
    shared: dict[str, Any] = {
        "tokens": tokens, "kinds": kinds, "ids": ids,
        "add_bos": _begins_with_bos(renderer), "template": renderer.template_source,
    }  # fmt: skip
    if pieces:
        scores, prefix = _scores(tokens, merges), _space_prefix(spec, where)
        return Vocabulary("llama", pre="default", merges=[], scores=scores, space_prefix=prefix, **shared)
    texts = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
    pre = _pre_tokenizer(spec.get("pre_tokenizer"), where)
    return Vocabulary("gpt2", pre=pre, merges=texts, scores=[], space_prefix=None, **shared)


def _begins_with_bos(renderer: Any) -> bool:
    """Whether prompts begin with BOS: as the template renders them, not as the tokenizer would on its own."""
    if not renderer.has_template:
        return bool(renderer.adds_bos)
    return renderer.prompt_ids([{"role": "user", "content": "Question"}])[:1] == [renderer.bos_id]


def _unknown(what: str, expected: str, got: str, where: str) -> InputError:
    fix = "`tunegate merge`, then llama.cpp's own convert_hf_to_gguf.py on the merged folder"
    return InputError(what, where=f"{where}/tokenizer.json", expected=expected, got=got, fix=fix)


def _tokens(
    tokenizer: Any, spec: Mapping[str, Any], size: int, pieces: bool, where: str
) -> tuple[list[str], list[int]]:
    """Texts and kinds by id; ids without a token are unused ones."""
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        what = "the tokenizer has more tokens than the embedding has rows"
        raise InputError(what, where=where, expected=f"at most {size}", got=f"{max(texts) + 1}")
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    unknown = tokenizer.unk_token_id if pieces else None
    tokens, kinds = [], []
    for i in range(size):
        text = texts.get(i, f"[PAD{i}]")
        if i not in texts:
            kind = UNUSED
        elif i == unknown:
            kind = UNKNOWN
        elif i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
            text = text.replace(_SPACE, " ") if kind == USER_DEFINED and pieces else text
        else:
            kind = BYTE if pieces and _is_byte(text) else NORMAL
        tokens.append(text)
        kinds.append(kind)
    return tokens, kinds


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the rank of the first merge that gives a piece; pieces that no merge gives come after all of them."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _parts(spec: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if spec is None:
        return []
    return [part for inner in spec[key] for part in _parts(inner, key)] if spec["type"] == "Sequence" else [spec]


def _pre_tokenizer(spec: Mapping[str, Any] | None, where: str) -> str:
    """llama.cpp's name for the rule that splits text before merging."""
    rule = tuple(_describe(part) for part in _parts(spec, "pretokenizers"))
    if rule not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS.values()))
        raise _unknown("llama.cpp has no name known here for this pre-tokenizer", known, " + ".join(rule), where)
    return _PRE_TOKENIZERS[rule]


def _describe(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "bytes split" if part["use_regex"] else "bytes"
    if kind == "Digits" and part["individual_digits"]:
        return "digits"
    if kind == "Split" and part["behavior"] in ("Isolated", "Removed") and "Regex" in part["pattern"]:
        inverted = (part["behavior"] == "Removed") == bool(part["invert"])
        return str(part["pattern"]["Regex"]) if inverted else json.dumps(part)
    return json.dumps(part)


def _space_prefix(spec: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put in front of text; checked to be SentencePiece's treatment of spaces."""
    normal = _parts(spec.get("normalizer"), "normalizers")
    before = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    prepends = any(p["type"] == "Prepend" and p["prepend"] == _SPACE for p in normal)
    replaces = any(
        p["type"] == "Replace" and p["pattern"] == {"String": " "} and p["content"] == _SPACE for p in normal
    )
    meta = next((p for p in before if p["type"] == "Metaspace" and p["replacement"] == _SPACE), None)
    if not replaces and meta is None:
        got = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])[:200]
        raise _unknown("spaces are not treated as SentencePiece does", "spaces become ▁", got, where)
    return prepends or (meta is not None and meta.get("prepend_scheme") != "never")


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Into a ``gguf.GGUFWriter``."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name, number in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
