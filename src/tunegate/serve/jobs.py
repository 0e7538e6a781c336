"""What the front of the server and its engine say to each other: jobs in, tokens out.

The front (HTTP, templates, text) and the engine (the model) are two processes. A :class:`Job` is one answer to make;
its :class:`Tokens` come back as they are made, and the last ones say why the answer ended. Adapters are named by a
``key``, their content hash, so that a name can move to other weights while answers are under way. A key also says how
they are computed: on merged weights if it ends in :data:`MERGED`, which rounds otherwise than on top of the base's.

It holds no text: the front turns text into ids and ids into text, and looks for stop strings. Everything here is plain
data that JSON can carry; :func:`to_json` and the ``from_json`` beside each class are the wire form.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tunegate.engine.sampling import Picking
from tunegate.errors import TunegateError

Finish = Literal["stop", "length", "cancelled"]
MERGED = "+merged"


class EngineGone(TunegateError):
    """The engine's process ended while a job was under way; it is started again, and the job may be sent again."""


class EngineFull(TunegateError):
    """No room for the job now: too many wait. It may be sent again later."""


@dataclass(frozen=True)
class Job:
    """One answer. ``tokens``: the prompt's ids, at least one. ``max_new_tokens`` 0: the prompt is computed and nothing
    made. ``adapter``: its key, None for the base alone.

    ``stop_ids`` end the answer and are not part of it. ``form``: (kind, value, compact) of an
    :class:`~tunegate.engine.constrain.AnswerForm` that the answer keeps to. ``logprobs``: log-probabilities of the
    chosen token and of that many likeliest ones (0: the chosen one's only), of the distribution before temperature and
    penalties; None for none. ``prompt_logprobs``: the same of the prompt's tokens, and of a token of ``stop_ids`` that
    ends the answer.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    adapter: str | None = None
    picking: Picking = field(default_factory=Picking)
    form: tuple[str, str | tuple[str, ...], bool] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        picking = dict(data["picking"])
        picking["logit_bias"] = tuple((int(i), float(b)) for i, b in picking["logit_bias"])
        form = data["form"]
        if form is not None:
            kind, value, compact = form
            form = (kind, value if isinstance(value, str) else tuple(value), compact)
        return cls(
            tuple(data["tokens"]),
            data["max_new_tokens"],
            tuple(data["stop_ids"]),
            data["adapter"],
            Picking(**picking),
            form,
            data["logprobs"],
            data["prompt_logprobs"],
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability in nats, and the likeliest tokens with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """The next ids of a job's answer, stop tokens left out. ``finish``: set on the last one. ``logprobs``: of these
    ids, and behind them of the stop token where the job asks for that. ``cached``: tokens of the prompt that were not
    computed again. ``stop_id``: the token that ended the answer. On the first one only:
    ``waited``, seconds until the job's prompt was begun, None where that is not known; ``prompt``, the prompt's tokens
    from the second on, where their log-probabilities were asked for."""

    ids: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    cached: int = 0
    waited: float | None = None
    stop_id: int | None = None
    prompt: tuple[TokenLogprob, ...] | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tokens:
        logprobs, prompt = (
            None
            if entries is None
            else tuple(TokenLogprob(e["token"], e["logprob"], tuple((i, p) for i, p in e["top"])) for e in entries)
            for entries in (data["logprobs"], data["prompt"])
        )
        return cls(
            tuple(data["ids"]), data["finish"], logprobs, data["cached"], data["waited"], data["stop_id"], prompt
        )  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """An adapter in the engine: its bytes there (of merged weights: theirs), its largest rank, seconds it took, the
    largest change of a logit that a probe saw (a load whose probe sees none is refused), and the seconds of each stage,
    those before it was asked for included."""

    key: str
    bytes: int
    rank: int
    seconds: float
    moved: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineOptions:
    """What an engine process is started with. Sizes in bytes; ``recipe`` quantizes the base while it is read
    (:meth:`~tunegate.kernels.formats.Recipe.to_json`, with ``keep``), None leaves it as stored. ``threads`` 0: all.
    ``adapter_dtype`` auto: what the base computes in."""

    base: str
    recipe: dict[str, Any] | None = None
    compute_dtype: str = "auto"
    adapter_dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    cache_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    most_rows: int = 64
    most_waiting: int = 1024
    step_tokens: int = 0  # tokens of one pass, 0: the engine chooses
    context: int | None = None  # longest prompt with its answer, None: the base's own
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EngineFacts:
    """What a started engine says of itself. ``context``: longest prompt with its answer, in tokens."""

    context: int
    vocabulary: int
    dtype: str
    path: str
    pages: int
    page_tokens: int
    base_bytes: int
    load_seconds: float


def to_json(value: Any) -> dict[str, Any]:
    """Any of the above as a dict for JSON."""
    return dataclasses.asdict(value)
