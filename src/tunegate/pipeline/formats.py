"""The formats of ``export``: for each, what it cannot hold, who writes it, and who can read it back.

Formats of the adapter are written from its factors, formats of the whole model stream the merge. A reader turns what
was written into a subject of the parity report; the first one that is installed is used.

It neither compares nor publishes: ``export`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tunegate.adapter.files import CONFIG, TENSORS, checked_state, load_state, read_spec, save_adapter
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.peft_config import read_config
from tunegate.adapter.spec import AdapterSpec
from tunegate.engine.runner import Runner
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.export import gguf_file, go_template, mlx, readers, vllm
from tunegate.export import llama_cpp as llama
from tunegate.export import merge as merging
from tunegate.export.deltas import ONE
from tunegate.export.flat import Flat, flatten
from tunegate.export.gguf_families import family_of
from tunegate.export.gguf_vocab import Vocabulary, vocabulary
from tunegate.export.parity import InRunner, Limits, Subject
from tunegate.export.plan import Plan, plan_merge, room_problems
from tunegate.files import write_json, write_text
from tunegate.model.loading import empty_model, load_model
from tunegate.model.origin import MERGE
from tunegate.model.weights import read_header
from tunegate.pipeline.adapted import Source, compute_dtype, made_from
from tunegate.pipeline.proof import Wanted
from tunegate.pipeline.reporter import Reporter

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
WITH_OUTTYPE, WITH_ONTO = ("gguf", "ollama"), ("gguf", "ollama", "vllm")  # vllm: of DoRA, which is merged


@dataclass(frozen=True)
class ExportRequest:
    """``outtype`` is the number format of a GGUF model. ``reader``: None takes the first one installed. The rest is as
    in ``MergeRequest``."""

    adapter: Path
    to: str
    out: Path
    outtype: str = "f16"
    base: str | None = None
    onto: str = "trained"
    reader: str | None = None
    limits: Limits = field(default_factory=Limits)
    allow_base_mismatch: bool = False
    items: Wanted = field(default_factory=Wanted)


@dataclass
class Job:
    """One export under way. ``model`` is the loaded base with the adapter on it; formats of the whole model let go of
    it before they stream. ``modules`` are the adapted ones, ``changed`` counts tensors, ``notes`` are for the user."""

    request: ExportRequest
    source: Source
    folder: Path
    reporter: Reporter
    about: Mapping[str, str]
    config: Any
    modules: tuple[str, ...]
    model: Any
    notes: list[str] = field(default_factory=list)
    changed: int = 0

    @cached_property
    def merge_plan(self) -> Plan:
        """The merge that a format of the whole model streams: in vLLM's into files like the base's."""
        request = self.request
        recipe = self.source.recipe if request.onto == "trained" else None
        checkpoint = request.to == "vllm"
        return plan_merge(
            self.source.folder, (request.adapter,), request.out, ONE, recipe=recipe, checkpoint=checkpoint
        )


@dataclass(frozen=True)
class Reader:
    """``read`` gives the exported file as a subject. ``installed`` says whether it can be used for a job here."""

    name: str
    installed: Callable[[Job], bool]
    read: Callable[[Job], Subject]


@dataclass(frozen=True)
class Format:
    check: Callable[[Job], None]
    write: Callable[[Job], object]
    readers: tuple[Reader, ...]


# --- formats of the adapter --------------------------------------------------------------------------------------


def _flat(job: Job) -> Flat:
    spec, state = checked_state(empty_model(job.source.folder), job.request.adapter)
    flat = flatten(spec, state)
    if flat.folded:
        job.notes.append(f"{len(flat.folded)} modules had a scale of their own, which is now in their B")
    if flat.padded:
        job.notes.append(f"{len(flat.padded)} modules had a smaller rank and are padded to {flat.rank} with zeros")
    job.changed = len(flat.modules)
    return flat


def _nothing(job: Job) -> None:
    """Every adapter can be written in this format."""


def _write_peft(job: Job) -> None:
    revision = read_config(job.request.adapter / CONFIG).get("revision")
    spec, state = checked_state(empty_model(job.source.folder), job.request.adapter)
    _save(job, spec, state, revision)
    job.changed = len(job.modules)


def _save(job: Job, spec: AdapterSpec, state: Mapping[str, Tensor], revision: str | None) -> None:
    """The adapter as a PEFT folder."""
    remove(job.model)
    injection = inject(job.model, spec, seed=0, strict=False)
    load_state(injection, state)
    save_adapter(job.folder, injection, base_name=job.source.name, revision=revision)


def _on_own_model(job: Job) -> Subject:
    spec, state = checked_state(empty_model(job.source.folder), job.folder)
    return readers.adapter_on(job.model, spec, state)


def _on_peft(job: Job) -> Subject:
    job.model = None  # one model in memory at a time
    return readers.in_peft(load_model(job.source.folder, dtype=compute_dtype()), job.folder)


def _is_plain(job: Job) -> bool:
    """Whether the base the adapter was trained on is one that other libraries load as it is."""
    return job.source.recipe is None


def _write_vllm(job: Job) -> None:
    """A plain LoRA, or for DoRA the merged model."""
    for finding in vllm_findings(job.request.adapter, job.source):
        job.notes.append(finding.what if finding.level == "note" else f"{finding.level}: {finding.what}")
    if read_spec(job.request.adapter).use_dora:
        job.notes.append("vLLM takes no DoRA: this is the merged model, served without an adapter")
        job.model = None
        job.changed = merging.write_merged(job.merge_plan, template=job.source.template).changed
        (job.folder / merging.PROGRESS).unlink(missing_ok=True)
        write_json(job.folder / MERGE, made_from(job.source, [job.request.adapter], [1.0], job.folder))
        return
    _save(job, *vllm.as_peft(vllm.plain(_flat(job))), None)
    if job.source.renderer.template_source is not None:
        write_text(job.folder / merging.TEMPLATE, job.source.renderer.template_source)


def _check_vllm(job: Job) -> None:
    """:class:`InputError` for what vLLM would not take after all that can be converted is; a merged model it takes."""
    if read_spec(job.request.adapter).use_dora:
        _ = job.merge_plan  # :class:`InputError` if that cannot be
        return
    spec, state = vllm.as_peft(vllm.plain(_flat(job)))
    job.notes.clear()
    config = {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(job.modules)}
    problems = [
        Problem(f"vLLM would not serve it: {found.what}", str(job.request.adapter), fix=found.fix)
        for found in _findings(config, list(state), job.source)
        if found.level in vllm.AGAINST
    ]
    if problems:
        raise InputError(problems)


def vllm_findings(adapter: Path, source: Source) -> list[vllm.Finding]:
    """What vLLM makes of the adapter as it is."""
    names = [entry.name for entry in read_header(adapter / TENSORS)]
    return _findings(read_config(adapter / CONFIG), names, source)


def _findings(config: Mapping[str, Any], tensors: list[str], source: Source) -> list[vllm.Finding]:
    model = empty_model(source.folder)
    modules = [path for path, _ in model.named_modules() if path]
    return vllm.findings(config, tensors, modules, model.config.vocab_size)


def _on_vllm_folder(job: Job) -> Subject:
    if not (job.folder / CONFIG).exists():  # the merged model
        return InRunner(Runner(load_model(job.folder, dtype=compute_dtype())))
    return _on_own_model(job)


def _write_gguf_adapter(job: Job) -> None:
    gguf_file.write_adapter(_flat(job), job.config, job.folder / ADAPTER, job.about)


def _check_gguf_adapter(job: Job) -> None:
    family_of(job.config)
    gguf_file.check_no_magnitude(_flat(job))
    job.notes.clear()


def _on_gguf_adapter(job: Job) -> Subject:
    return readers.adapter_on(job.model, *readers.read_gguf_adapter(job.folder / ADAPTER, job.config, job.modules))


def _check_mlx(job: Job) -> None:
    mlx.check_family(job.config)


def _write_mlx(job: Job) -> None:
    mlx.write_mlx(_flat(job), job.config, job.source.name, job.folder)


def _on_mlx_files(job: Job) -> Subject:
    return readers.adapter_on(job.model, *mlx.read_mlx(job.folder))


# --- formats of the whole model ----------------------------------------------------------------------------------


def _layout(job: Job) -> gguf_file.Layout:
    words = vocabulary(job.source.renderer, job.merge_plan.config.vocab_size, str(job.source.folder))
    return gguf_file.lay_out(job.merge_plan, words, job.request.outtype)


def _check_gguf(job: Job) -> None:
    problems = room_problems(job.request.out, gguf_file.file_bytes(_layout(job)))
    if problems:
        raise InputError(problems)


def _write_gguf(job: Job) -> Vocabulary:
    job.model, layout = None, _layout(job)
    window = getattr(layout.plan.config, "sliding_window", None)
    if window and not layout.family.window_period and window < layout.plan.config.max_position_embeddings:
        job.notes.append(f"the context is {window} tokens: llama.cpp knows no sliding window for this architecture")
    with job.reporter.progress("writing, bytes", sum(p.stat().st_size for p in layout.plan.files)) as advance:
        job.changed = gguf_file.write_model(layout, job.folder / MODEL, job.about, advance)
    return layout.vocabulary


def _write_ollama(job: Job) -> None:
    renderer, words = job.source.renderer, _write_gguf(job)
    turns = go_template.find_turns(renderer.rendered, _golden_chats(job)) if renderer.has_template else "there is none"
    if isinstance(turns, str):
        job.notes.append(f"the chat template cannot be a Go template: {turns}; send rendered prompts")
    elif turns.trims:
        job.notes.append("the chat template trims contents, which Ollama cannot: send them without outer white space")
    if "tools" in (renderer.template_source or ""):
        job.notes.append("tool calls are not part of Ollama's template")
    tokenizer = renderer.tokenizer
    text = go_template.modelfile(
        turns,
        gguf=MODEL,
        stops=[tokenizer.decode([i]) for i in job.source.exam.golden.stop_ids],
        bos=tokenizer.bos_token if words.add_bos and tokenizer.bos_token else "",
        about=[f"{key}: {value}" for key, value in job.about.items()],
    )
    write_text(job.folder / MODELFILE, text)


def _golden_chats(job: Job) -> list[Any]:
    """The card's golden prompts without tools."""
    golden = [entry for card in job.source.cards for entry in card.template["golden"]]
    return [entry["messages"] for entry in golden if "messages" in entry and not entry.get("tools")]


def _on_llama_cpp(job: Job) -> Subject:
    """The file in llama.cpp, whose vocabulary must split every golden prompt as training did."""
    exam, decode = job.source.exam, job.source.renderer.tokenizer.decode
    subject = llama.LlamaCpp(job.folder / MODEL, exam.longest)
    for prompt in exam.golden.prompts:
        text = decode(prompt, clean_up_tokenization_spaces=False)
        if (got := subject.tokens(text)) != list(prompt):
            n = next(
                (i for i, (a, b) in enumerate(zip(prompt, got, strict=False)) if a != b), min(len(prompt), len(got))
            )
            raise TunegateError(
                "llama.cpp splits a prompt into other tokens than training did",
                where=f"{MODEL}: token {n}",
                expected=f"{list(prompt[n : n + 6])}, {decode(prompt[n : n + 6])!r}",
                got=f"{got[n : n + 6]}, {decode(got[n : n + 6])!r}",
                fix="`tunegate merge`, then llama.cpp's own convert_hf_to_gguf.py on the merged folder",
            )
    return subject


def _in_transformers(job: Job) -> bool:
    known = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
    return readers.installed("accelerate") and job.config.model_type in known


def _always(job: Job) -> bool:
    del job
    return True


_PEFT = Reader("peft", lambda job: readers.installed("peft") and _is_plain(job), _on_peft)
_GGUF_READERS = (
    Reader("llama.cpp", lambda job: llama.available(), _on_llama_cpp),
    Reader(
        "transformers", _in_transformers, lambda job: readers.in_transformers_gguf(job.folder / MODEL, job.config)
    ),
    Reader(
        "gguf", _always,
        lambda job: readers.load_gguf(job.folder / MODEL, load_model(job.source.folder, dtype=compute_dtype())),
    ),
)  # fmt: skip
FORMATS: dict[str, Format] = {
    "peft": Format(_nothing, _write_peft, (_PEFT, Reader("tunegate", _always, _on_own_model))),
    "gguf": Format(_check_gguf, _write_gguf, _GGUF_READERS),
    "gguf-lora": Format(
        _check_gguf_adapter, _write_gguf_adapter, (Reader("gguf", _always, _on_gguf_adapter),)
    ),
    "ollama": Format(_check_gguf, _write_ollama, _GGUF_READERS),
    "mlx": Format(
        _check_mlx, _write_mlx,
        (
            Reader(
                "mlx-lm",
                lambda job: readers.installed("mlx", "mlx_lm") and _is_plain(job),
                lambda job: readers.InMlx(job.source.folder, job.folder),
            ),
            Reader("safetensors", _always, _on_mlx_files),
        ),
    ),
    "vllm": Format(
        _check_vllm, _write_vllm,
        (
            Reader("peft", lambda job: _PEFT.installed(job) and not read_spec(job.request.adapter).use_dora, _on_peft),
            Reader("tunegate", _always, _on_vllm_folder),
        ),
    ),
}  # fmt: skip
