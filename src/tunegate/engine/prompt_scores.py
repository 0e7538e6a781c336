"""The logits of a prompt's own tokens, read while the prompt is computed.

A prompt goes through passes in pieces. A row with a :class:`PromptReader` has the head applied to the hidden states of
each piece, some positions at a time, so that logits of a whole prompt never exist. Positions that are computed again,
because the row gave its pages back, are not read twice. :class:`PromptScores` makes log-probabilities of what it sees.

The last position is not read: its logits choose the answer's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunegate.engine.sampling import Chosen
from tunegate.kernels import Head, logit_chunks


class PromptReader:
    """Shows ``see`` the logits after each token of a prompt of so many ``tokens`` but the last, in order and in chunks:
    (position of the first, (n, V) fp32 on the CPU)."""

    def __init__(self, tokens: int, see: Callable[[int, Tensor], None]):
        self.end, self.see = tokens - 1, see
        self.done = 0

    def take(self, first: int, hidden: Tensor, head: Head) -> None:
        """``hidden`` (n, H) are the last states at the positions from ``first`` on."""
        part = hidden[max(0, self.done - first) : max(0, self.end - first)]
        for logits in logit_chunks(part, head) if len(part) else ():
            self.see(self.done, logits.cpu())
            self.done += len(logits)


class PromptScores:
    """The log-probability of every token of ``prompt`` but the first, and of the ``most`` likeliest ones in its place
    (:class:`~tunegate.engine.sampling.Chosen`)."""

    def __init__(self, prompt: Sequence[int], most: int):
        self.prompt, self.most = prompt, most
        self.found: list[Chosen] = []
        self.reader = PromptReader(len(prompt), self._see)

    def _see(self, first: int, logits: Tensor) -> None:
        logprobs = logits.log_softmax(-1)
        tokens = self.prompt[first + 1 : first + 1 + len(logits)]
        own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        top = logprobs.topk(min(self.most, logprobs.shape[1]))
        for token, logprob, ids, values in zip(tokens, own, top.indices.tolist(), top.values.tolist(), strict=True):
            self.found.append(Chosen(token, logprob, tuple(zip(ids, values, strict=True))))
