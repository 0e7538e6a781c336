"""Tiny random bases for tests: real architectures of transformers, two layers of width 32, no download.

``tiny_base`` writes a folder in Hugging Face form: config, safetensors weights and a byte-level BPE tokenizer with a
ChatML template. The same arguments give the same weights and the same token ids in every process. Every parameter is
random, norms and biases too, so that a forgotten bias or norm changes the logits.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt2")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. How do I change my delivery address?",
    "Where is my order? I was charged twice and I want a refund, please cancel it.",
    "system user assistant answer question label yes no red green blue one two three four five",
    'Answer with the intent name only. {"name": "value", "list": [1, 2, 3], "ok": true}',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好, 世界!",
    "name: Alice, quantity: 12, city: Paris; 3 + 4 = 7 and 10 - 2 = 8",
]


@functools.cache
def tiny_tokenizer_json() -> str:
    """A byte-level BPE tokenizer of 400 entries (3 specials, 256 bytes, merges), as the text of tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: str = CHATML) -> Any:
    """The tokenizer above as transformers' fast tokenizer: eos ``<|im_end|>``, bos and pad ``<|endoftext|>``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer_json()),
        bos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
        model_max_length=512,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """A two-layer config of ``family`` with grouped-query attention (4 heads, 2 key-value heads) where it exists."""
    import transformers

    classes = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "gemma2": "Gemma2Config",
        "gemma3": "Gemma3TextConfig",
        "phi3": "Phi3Config",
        "gpt_neox": "GPTNeoXConfig",
        "gpt2": "GPT2Config",
    }
    ids = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "vocab_size": 400}
    if family == "gpt2":
        shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 64}
        shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    if family not in ("gpt2", "gpt_neox"):
        shape["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma2", "gemma3"):
        shape["head_dim"] = 16  # not hidden_size / heads, as in the real ones
    if family in ("gemma2", "gemma3"):
        shape |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
    if family == "gemma3":  # one layer of each kind; the default pattern makes only the sixth layer full
        shape["layer_types"] = ["sliding_attention", "full_attention"]
    if family in ("llama", "qwen2"):
        shape["tie_word_embeddings"] = True  # as in SmolLM2 and the small Qwen2
    return getattr(transformers, classes[family])(**{**ids, **shape, **overrides})


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random fp32 causal LM in eval mode; ``overrides`` go to its config."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def tiny_base(
    folder: Path | str, family: str = "llama", seed: int = 0, template: str = CHATML, **overrides: Any
) -> Path:
    """Write a tiny random base to ``folder`` (created if needed) and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(family, seed, **overrides).save_pretrained(folder, safe_serialization=True)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def toy_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` distinct prompt/completion rows of a task a tiny model can learn: the answer is a word of the prompt."""
    colours = ("red", "green", "blue")
    rng = random.Random(seed)
    return [
        {"prompt": f"question {number}: the {colour} fox", "completion": colour}
        for number in range(n)
        for colour in [rng.choice(colours)]
    ]
