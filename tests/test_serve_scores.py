"""Log-probabilities of prompts as a client gets them from the command: transformers', and lm-eval-harness's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from served import make_adapter, served_base
from test_serve_real import client, server
from tunegate.adapter.files import adapter_hash, load_adapter
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.serve.base import ServedBase

PAIRS = [
    ("Where is it?\nAnswer:", " in the box"),
    ("Where is it?\nAnswer: ", "in the box"),
    ("a " * 40, " b"),
    ("question", " zwölf Boxkämpfer"),
    ("the quick brown", " fox"),
]


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


@pytest.fixture(scope="module")
def adapter(base: ServedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "a", base, seed=3)


@pytest.fixture(scope="module")
def address(base: ServedBase, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base, and an adapter on merged weights."""
    home, named = tmp_path_factory.mktemp("home"), ["--adapter", f"a={adapter}", "--merged", "a"]
    with server(str(base.resolved.path), *named, home=home) as (found, _):
        yield found


def model_of(base: ServedBase, adapter: Path | None) -> Any:
    model = load_model(base.resolved.path, dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("new", [0, 3])
def test_a_prompts_scores_are_transformers(
    address: str, base: ServedBase, adapter: Path, adapted: bool, new: int
) -> None:  # fmt: skip
    asked, text = client(address), "Where is my order? zwölf 你好 " * 18  # more tokens than one pass takes
    model = model_of(base, adapter if adapted else None)
    ids = load_tokenizer(base.resolved.path)(text)["input_ids"]
    assert len(ids) > 256
    wanted = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    for prompt in (text, ids, text):  # the last time its pages are known
        found = asked.completions.create(
            model="a" if adapted else base.name, prompt=prompt, echo=True, logprobs=2, max_tokens=new, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        choice, told = found.choices[0], found.choices[0].logprobs
        assert found.system_fingerprint == (adapter_hash(adapter) if adapted else base.at_hand.fingerprint.total)
        assert choice.text.startswith(text) and found.usage.prompt_tokens == len(ids)
        assert len(told.tokens) == len(ids) + new == len(told.text_offset) and told.token_logprobs[0] is None
        own = [float(wanted[place, token]) for place, token in enumerate(ids[1:])]
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
        for place, top in enumerate(told.top_logprobs[1 : len(ids)]):
            best = wanted[place].topk(2).values.tolist()
            assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)


def harness(address: str, base: ServedBase, model: str) -> Any:
    """lm-eval's client of ``/v1/completions``."""
    pytest.importorskip("lm_eval", reason="lm-eval-harness is not installed")
    pytest.importorskip("tenacity", reason="lm-eval's api extra is not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model=model, tokenizer=str(base.resolved.path), max_length=512,
        tokenizer_backend="huggingface", num_concurrent=1, max_retries=1,
    )  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
def test_lm_eval_sees_what_it_sees_of_the_model_itself(
    address: str, base: ServedBase, adapter: Path, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    mine = harness(address, base, "a" if adapted else base.name)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = model_of(base, adapter if adapted else None)
    theirs = HFLM(pretrained=model, tokenizer=load_tokenizer(base.resolved.path), batch_size=1, max_length=512)

    def asked(kind: str, *arguments: Any) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    requests = [asked("loglikelihood", *pair) for pair in PAIRS]
    for (score, greedy), (wanted, is_greedy) in zip(
        mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert score == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy
    texts = [asked("loglikelihood_rolling", text) for text in ("the quick brown fox", "Where is my order? " * 20)]
    assert mine.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-2)


def test_the_request_that_lm_eval_makes(address: str, base: ServedBase) -> None:
    """What it reads is ``token_logprobs[context:-1]``: one entry for the token made, also if that ends the answer."""
    asked, ids = client(address), load_tokenizer(base.resolved.path)("the quick brown fox")["input_ids"]
    likeliest = int(model_of(base, None)(torch.tensor([ids])).logits[0, -1].argmax())
    for stops in ([], [likeliest]):
        found = asked.completions.create(
            model=base.name, prompt=[ids, ids[:1]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True,
            extra_body={"stop_token_ids": stops},
        )  # fmt: skip
        counts = [len(choice.logprobs.token_logprobs) for choice in found.choices]
        assert counts == [len(ids) + 1, 2] and found.choices[0].finish_reason == ("stop" if stops else "length")
