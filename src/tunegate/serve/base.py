"""The base that a server runs, as its front sees it: hashed, rendered and described, never loaded.

A renderer is made for each chat template that adapters were trained with, and shared by all of them; one that no
adapter uses any more is forgotten. The model without its weights (meta device) says which modules an adapter may have.

It loads no weights: the engine does.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tunegate.adapter.card import AtHand, recipe_text, template_of, template_problems
from tunegate.adapter.files import Known, checked_header
from tunegate.adapter.inject import head_paths
from tunegate.data.render import Renderer
from tunegate.errors import InputError, Problem
from tunegate.model.bnb_files import stored_recipe
from tunegate.model.fingerprint import fingerprint_base
from tunegate.model.loading import empty_model, eos_ids, load_tokenizer
from tunegate.model.resolve import ResolvedBase
from tunegate.model.weights import tensors_of
from tunegate.records import AdapterCard

_MOST_CHECKERS = 8


@dataclass(frozen=True)
class ServedBase:
    """``name`` is what clients write; ``at_hand`` what adapters are compared with; ``skeleton`` is on the meta device.
    ``created``: Unix time in seconds."""

    name: str
    resolved: ResolvedBase
    at_hand: AtHand
    tokenizer: Any
    skeleton: nn.Module
    created: int = field(default_factory=lambda: int(time.time()))
    _renderers: weakref.WeakValueDictionary[str | None, Renderer] = field(default_factory=weakref.WeakValueDictionary)
    _known: Known = field(default_factory=Known)
    _checkers: dict[str | None, Renderer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checking: threading.Lock = field(default_factory=threading.Lock)

    @functools.cached_property
    def head(self) -> set[str]:
        """Modules that are, or share their weight with, the output head."""
        return head_paths(self.skeleton)

    def modules_of(self, folder: Path) -> tuple[str, ...]:
        """The modules that an adapter has here (:func:`~tunegate.adapter.files.checked_header`); from any thread."""
        return checked_header(self.skeleton, folder, self._known)[1]

    def renderer(self, template: str | None = None) -> Renderer:
        """The renderer of a chat template (None: the base's own); :class:`InputError` if it is none. To be had from any
        thread, to be used by one."""
        with self._lock:
            found = self._renderers.get(template)
            if found is None:
                found = self._renderers[template] = self._make(template)
            return found

    def golden_problems(self, card: AdapterCard) -> list[Problem]:
        """The golden prompts that give other tokens here with the template of the training; from any thread, while
        :meth:`renderer`'s are in use. :class:`InputError` if there is no such template."""
        template = template_of(card)
        if not card.template["golden"]:
            what = "the card has no golden prompts, so nothing shows that prompts are those of the training"
            return [Problem(what, fix="train it again with `tunegate run`")]
        with self._checking:
            if template not in self._checkers:
                if len(self._checkers) >= _MOST_CHECKERS:
                    self._checkers.clear()
                self._checkers[template] = self._make(template)
            return template_problems(card, self._checkers[template])

    def _make(self, template: str | None) -> Renderer:
        return Renderer(self.tokenizer, template=template, eos_ids=eos_ids(self.resolved.path))


def open_base(
    resolved: ResolvedBase, recipe: Mapping[str, Any] | None = None, *, name: str = "", trust_remote_code: bool = False
) -> ServedBase:
    """The base in ``resolved`` under ``name`` (default: the hub id, the packaged name, or the folder's own name).

    ``recipe``: how its weights will be quantized, in a card's form; :class:`InputError` if they are stored otherwise.
    """
    stored = stored_recipe(e.name for entries in tensors_of(resolved.path).values() for e in entries)
    if stored is not None and recipe not in (None, stored):
        raise InputError(
            "the base is stored quantized already", where=str(resolved.path), expected=recipe_text(recipe),
            got=recipe_text(stored), fix="serve it as it is stored, or name the 16-bit original",
        )  # fmt: skip
    short = resolved.path.name if resolved.source == "folder" else resolved.name
    at_hand = AtHand(resolved.name, fingerprint_base(resolved.path), stored or recipe)
    tokenizer = load_tokenizer(resolved.path, trust_remote_code=trust_remote_code)
    skeleton = empty_model(resolved.path, trust_remote_code=trust_remote_code)
    return ServedBase(name or short, resolved, at_hand, tokenizer, skeleton)
