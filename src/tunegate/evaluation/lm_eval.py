"""The catalogue of lm-eval-harness on our engine: ``lm_eval:arc_easy`` and every other task of text alone.

:class:`EngineLM` offers what the harness asks of a model (``lm_eval.api.model.LM``: loglikelihood,
loglikelihood_rolling, generate_until, apply_chat_template), so the harness builds the prompts and scores the answers,
and the base and the adapter run exactly as everywhere else here. Context and continuation are tokenised together and
split, white space at the border goes to the continuation, as the harness's own models do it.

:func:`measure_tasks` gives the items' scores in the form of ``regression``, so that tasks are compared, paired, like
any other set. The harness is an extra (``pip install 'tunegate[lm-eval]'``); the data of its tasks come from the
hub. Code-running tasks need consent, images are not read, settings of generation that the engine lacks are errors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from tunegate.data.pack import split_batches
from tunegate.data.types import Rendered
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import evaluating
from tunegate.errors import InputError, Problem, nearest
from tunegate.evaluation.answering import Model
from tunegate.evaluation.regression import ItemResult, Measured
from tunegate.evaluation.sets import LM_EVAL_PREFIX
from tunegate.files import hash_json
from tunegate.kernels.cross_entropy import argmax_logits, target_log_probs

MAX_NEW_TOKENS = 256
STAGE = 32  # tokens generated before the stop texts are looked for
KNOWN_SETTINGS = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_p",
)
HARMLESS = {"num_beams": 1, "repetition_penalty": 1.0, "top_k": 0, "early_stopping": False, "num_return_sequences": 1}
METRICS = ("acc", "exact_match", "em", "f1", "acc_norm", "mc2", "bleu", "rougeL", "contains", "prompt_level_strict_acc")


class EngineLM:
    """A model as the harness calls it. ``seed`` seeds sampling where a task asks for it."""

    rank = 0
    world_size = 1

    def __init__(self, model: Model, seed: int = 0):
        self.model, self.seed = model, seed
        self.device = model.runner.device
        self.tokenizer_name = model.renderer.template_hash

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        if self.model.runner.context is not None:
            return self.model.runner.context
        config = self.model.runner.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    # --- what the harness calls ----------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood in nats, and whether greedy decoding would give it."""
        del disable_tqdm
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): log-likelihood in nats after the prefix token; a longer text is read in windows."""
        del disable_tqdm
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for number, request in enumerate(requests):
            for pair in self._windows(self.encode(request.args[0], start=False)):
                owners.append(number)
                pairs.append(pair)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, settings), cut before the first stop text."""
        del disable_tqdm
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(hash_json(request.args[1]), []).append(number)
        for places in groups.values():
            settings = self._settings(requests[places[0]].args[1])
            contexts = [self.encode(requests[n].args[0]) for n in places]
            found |= zip(places, self._continue(contexts, settings), strict=True)
        return [found[n] for n in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, by the renderer's own template."""
        tokenizer = self.model.renderer.tokenizer
        if not self.model.renderer.has_template:
            raise InputError("the base has no chat template", fix="set base.template, or measure without chat")
        text: str = tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # --- tokens --------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of ``text``, with the tokenizer's BOS in front where it adds one and none stands there."""
        renderer = self.model.renderer
        ids: list[int] = renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if start and renderer.adds_bos and renderer.bos_id is not None and ids[:1] != [renderer.bos_id]:
            return [renderer.bos_id, *ids]
        return ids

    @property
    def prefix(self) -> int:
        """The token that stands for an empty context: BOS, or the end of text."""
        renderer = self.model.renderer
        found = renderer.bos_id if renderer.bos_id is not None else renderer.eos_id
        if found is None:
            raise InputError("the tokenizer has neither BOS nor EOS, so nothing can stand for an empty context")
        return found

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            ids = self.encode(continuation, start=False)
            return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        before = self.encode(context)
        if not before:  # white space alone
            return [self.prefix], self.encode(continuation, start=False)
        return before, self.encode(context + continuation)[len(before) :]

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """(context, predicted) of every window: each token predicted once, the last window as full as any."""
        size, found, done = self.max_length, [], 0
        while done < len(ids):
            end = done + min(size, len(ids) - done)
            start = max(0, end - size)
            context = [self.prefix, *ids[:done]] if start == 0 else ids[start - 1 : done]
            found.append((context, ids[done:end]))
            done = end
        return found

    # --- computing -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        runner = self.model.runner
        found: dict[int, tuple[float, bool]] = {n: (0.0, True) for n, (_, tail) in enumerate(pairs) if not tail}
        rows = []
        for number, (context, tail) in enumerate(pairs):
            if tail:
                ids = (*context, *tail)[-(self.max_length + 1) :]
                targets = min(len(tail), len(ids) - 1)
                rows.append(Rendered(str(number), ids, (False,) * (len(ids) - targets) + (True,) * targets))
        rows.sort(key=len)
        batches = split_batches(rows, self.model.tokens, share_prefix=runner.shares_prefix) if rows else []
        with evaluating(runner.model):
            for batch in batches:
                hidden = runner.hidden(batch)[batch.predictors.to(runner.device)]
                labels = batch.labels.to(runner.device)
                values = target_log_probs(hidden, labels, runner.head).double().cpu()
                best = (argmax_logits(hidden, runner.head) == labels).cpu()
                for number, row_id in enumerate(batch.row_ids):
                    mine = batch.target_rows == number
                    found[int(row_id)] = (float(values[mine].sum()), bool(best[mine].all()))
        return [found[n] for n in range(len(pairs))]

    def _settings(self, given: Any) -> dict[str, Any]:
        """The engine's settings for a task's ``gen_kwargs``; :class:`InputError` for what it cannot do."""
        given = dict(given or {})
        wrong = [k for k, v in given.items() if k not in KNOWN_SETTINGS and not (k in HARMLESS and v == HARMLESS[k])]
        if wrong:
            raise InputError(
                [Problem(f"a task asks for {key}={given[key]!r}", key, "settings that the engine has") for key in wrong]
            )
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = next((given[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in given), MAX_NEW_TOKENS)
        sampled = bool(given.get("do_sample", False)) and float(given.get("temperature", 1.0)) > 0
        return {
            "stops": [stop for stop in stops if stop],
            "limit": int(limit),
            "temperature": float(given.get("temperature", 1.0)) if sampled else 0.0,
            "top_p": float(given.get("top_p", 1.0)),
        }

    def _continue(self, contexts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[str]:
        """Greedy answers grow in stages, so that a row whose stop text came is not generated to its limit."""
        renderer, limit = self.model.renderer, min(settings["limit"], self.max_length - 1)
        stage = STAGE if settings["temperature"] == 0 else limit
        starts = [list(ids)[-(self.max_length - limit) :] or [self.prefix] for ids in contexts]
        new: list[list[int]] = [[] for _ in starts]
        open_rows = list(range(len(starts)))
        while open_rows:
            sizes = min(stage, limit - len(new[open_rows[0]]))
            sampling = Sampling(
                sizes, renderer.stop_ids, settings["temperature"], settings["top_p"], self.seed, self.model.rows
            )
            answers = generate(self.model.runner, [starts[n] + new[n] for n in open_rows], sampling)
            still = []
            for n, answer in zip(open_rows, answers, strict=True):
                new[n] += answer.ids
                text = renderer.decode(new[n])
                ended = answer.stopped or len(answer.ids) < sizes or len(new[n]) >= limit
                if not ended and not any(stop in text for stop in settings["stops"]):
                    still.append(n)
            open_rows = still
        return [_cut(renderer.decode(ids), settings["stops"]) for ids in new]


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def task_names(names: Sequence[str]) -> list[str]:
    """``lm_eval:NAME`` without its prefix."""
    return [name.removeprefix(LM_EVAL_PREFIX) for name in names]


def load_tasks(
    names: Sequence[str], manager: Any = None, *, shots: int | None = None, run_code: bool = False
) -> dict[str, Any]:
    """The harness's tasks by name (``lm_eval:`` in front or not), groups as their tasks.

    :class:`InputError` if the harness is not installed, a name is unknown, a task runs code without consent or
    reads more than text. ``manager`` is the harness's TaskManager, for tasks of one's own.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            "lm-eval-harness is not installed",
            where=", ".join(names),
            got=str(error),
            fix="pip install 'tunegate[lm-eval]'",
        ) from None
    manager = manager or TaskManager()
    wanted = task_names(names)
    known = list(manager.all_tasks)
    problems = [
        Problem("no such task of lm-eval-harness", LM_EVAL_PREFIX + name, fix=nearest(name, known))
        for name in wanted
        if name not in known
    ]
    if problems:
        raise InputError(problems)
    loaded: dict[str, Any] = manager.load(wanted)
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            problems.append(Problem("the task reads more than text", LM_EVAL_PREFIX + name))
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            problems.append(
                Problem("the task runs code that the model wrote", LM_EVAL_PREFIX + name, "consent: run_code: true")
            )
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=0)
    if problems:
        raise InputError(problems)
    return loaded


def measure_tasks(
    model: Model,
    tasks: dict[str, Any],
    *,
    subject: str,
    limit: int | None = None,
    chat: bool = False,
    run_code: bool = False,
) -> Measured:
    """Run loaded ``tasks`` (:func:`load_tasks`) on what is in place; the first ``limit`` items of each.

    A task is one domain, ``lm_eval:NAME``; an item's score is the task's first metric of :data:`METRICS`, else its
    first one with values in [0, 1]. The set's hash covers documents, prompts and targets.
    """
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    result: Any = evaluate(
        EngineLM(model),
        tasks,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=run_code,
    )
    results: list[ItemResult] = []
    hashes: dict[str, str] = {}
    metrics: dict[str, str] = {}
    for name, samples in result["samples"].items():
        domain = LM_EVAL_PREFIX + name
        kept = [s for s in samples if s["filter"] == samples[0]["filter"]]
        metrics[domain] = _metric(kept, domain)
        results += [_item(domain, sample, metrics[domain]) for sample in kept]
        hashes[domain] = hash_json([[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in kept])
    settings = {"lm_eval": {"metrics": metrics, "limit": limit, "chat": chat}}
    return Measured(subject, hashes, tuple(results), settings, time.perf_counter() - started)


def _metric(samples: Sequence[dict[str, Any]], domain: str) -> str:
    names = [name for name in samples[0]["metrics"] if all(_in_unit(s.get(name)) for s in samples)]
    ordered = [name for name in METRICS if name in names] or names
    if not ordered:
        raise InputError(
            "the task has no score from 0 to 1 for each item",
            where=domain,
            got=", ".join(samples[0]["metrics"]),
            fix="choose a task of accuracy or exact match",
        )
    return ordered[0]


def _in_unit(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0.0 <= float(value) <= 1.0


def _item(domain: str, sample: dict[str, Any], metric: str) -> ItemResult:
    answers = sample["filtered_resps"]
    text = answers[0] if len(answers) == 1 and isinstance(answers[0], str) else str(answers)
    return ItemResult(
        item=f"{domain}/{sample['doc_id']}",
        domain=domain,
        reference=str(sample["target"]),
        prediction=text[:2000],
        score=float(sample[metric]),
    )


def joined(parts: Sequence[Measured]) -> Measured:
    """Several measurements of one subject as one: own sets beside tasks of the harness."""
    if len({part.subject for part in parts}) != 1 or len({s for p in parts for s in p.sets}) < sum(
        len(p.sets) for p in parts
    ):
        raise InputError("only different sets of one subject can be joined", got=", ".join(p.subject for p in parts))
    settings: dict[str, Any] = {}
    for part in parts:
        settings |= part.settings
    return Measured(
        parts[0].subject,
        {name: digest for part in parts for name, digest in part.sets.items()},
        tuple(result for part in parts for result in part.results),
        settings,
        sum(part.seconds for part in parts),
        next((part.items_path for part in parts if part.items_path), ""),
    )
