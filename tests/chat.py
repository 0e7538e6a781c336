"""Small real tokenizers and chat templates of the common families, for the tests of rendering."""

from __future__ import annotations

import functools
import json
from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How do I change my delivery address?",
    "Where is my order? I was charged twice and I want a refund, please cancel it.",
    "system user assistant model answer question label yes no red green blue one two three",
    'Answer with the intent name only.\n\n{"name": "value", "list": [1, 2, 3], "ok": true}\n',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好, 世界!\n\n\nEnd.",
]

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content or '' %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # the markers leave the end-of-turn token out
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WIDE = (  # the markers hold the newline behind it too
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # role markers are text, BOS again at every turn
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
THINK_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@functools.cache
def _trained(kind: str, special: tuple[str, ...]) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer: Any
    if kind == "unigram":  # SentencePiece as Llama 2 has it, with a space put before every piece of text
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=list(special),
            unk_token="<unk>",
            initial_alphabet=[chr(c) for c in range(33, 127)],
            show_progress=False,
        )
    elif kind == "sentencepiece":  # SentencePiece as Gemma has it: BPE, byte fallback, no space in front
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *byte_tokens], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = byte_level if kind == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]  # byte tokens are ordinary
    return json.dumps(spec)


def make_tokenizer(
    kind: str, special: tuple[str, ...], template: Any, *, bos: str | None, eos: str, added: tuple[str, ...] = ()
) -> Any:
    """A fast tokenizer of ``kind`` gpt2, llama3, sentencepiece or unigram. ``added`` are not special."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained(kind, special))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def add_bos_by_default(tokenizer: Any) -> Any:
    from tokenizers import processors

    pair = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{pair[0]} $A", pair=f"{pair[0]} $A $B", special_tokens=[pair]
    )
    return tokenizer


@functools.cache
def tokenizer_of(family: str) -> Any:
    """Shared by tests: do not change what it returns."""
    if family in ("smollm2", "marked", "marked_wide"):
        template = {"smollm2": SMOLLM2, "marked": MARKED, "marked_wide": MARKED_WIDE}[family]
        return make_tokenizer("gpt2", CHATML_TOKENS, template, bos="<|im_start|>", eos="<|im_end|>")
    if family == "qwen3":
        return make_tokenizer("llama3", CHATML_TOKENS, QWEN3, bos=None, eos="<|im_end|>", added=THINK_TOKENS)
    if family == "llama3":
        tokenizer = make_tokenizer("llama3", LLAMA3_TOKENS, LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>")
        return add_bos_by_default(tokenizer)
    if family == "llama3_gpt2":  # a pre-tokenizer that looks ahead over the header's two newlines
        return make_tokenizer("gpt2", LLAMA3_TOKENS, LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>")
    if family == "gemma":
        tokenizer = make_tokenizer("sentencepiece", GEMMA_TOKENS, GEMMA, bos="<bos>", eos="<eos>")
        return add_bos_by_default(tokenizer)
    if family == "llama2":
        tokenizer = make_tokenizer("unigram", ("<unk>", "<s>", "</s>"), LLAMA2, bos="<s>", eos="</s>")
        return add_bos_by_default(tokenizer)
    assert family == "base", family
    return make_tokenizer("gpt2", ("<|endoftext|>",), None, bos="<|endoftext|>", eos="<|endoftext|>")


FAMILIES = ("smollm2", "marked", "marked_wide", "qwen3", "llama3", "llama3_gpt2", "gemma", "llama2")
