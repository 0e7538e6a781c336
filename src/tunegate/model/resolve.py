"""From what a user writes as ``base:`` to a checked folder on this machine.

A string is, in this order: a packaged name (``smollm2-135m-instruct``), an existing local folder, a hub id
``org/name``. Anything that starts with ``.``, ``/`` or ``~`` is a folder and never a hub id. From the hub, the
config is fetched and checked before the weights; only safetensors, JSON, tokenizer and template files are ever
asked for, so a pickle cannot arrive. Tokens, proxies and the cache are the hub library's own. Every folder,
wherever it came from, passes :func:`check_folder`, which reports all its problems together.

It reads headers and configs only: it does not load the model, hash it (``fingerprint``) or run its code.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.files import nearest_folder
from tunegate.model import packaged
from tunegate.model.weights import inspect_weights, load_object

Report = Callable[[str], None]

ALLOW = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
IGNORE = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("tekken.json",))


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine, checked.

    ``revision`` is the commit hash for the hub, the pinned package for a packaged base, None for a folder.
    """

    name: str
    path: Path
    revision: str | None
    source: Literal["folder", "hub", "packaged"]


def resolve_base(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    trust_remote_code: bool = False,
    report: Report = lambda _: None,
) -> ResolvedBase:
    """Find, fetch if need be, and check a base.

    ``revision`` is a branch, tag or commit of a hub id. ``offline`` uses only what is on this machine, as
    ``HF_HUB_OFFLINE=1`` does. Raises :class:`InputError` with every problem found.
    """
    if not name.strip():
        raise InputError("no base is named", where="base", expected="a folder, a hub id or a packaged name")
    base = _find(name, revision, offline, trust_remote_code, report)
    problems = check_folder(base.path, trust_remote_code=trust_remote_code, report=report)
    if problems and base.source == "packaged":
        problems.append(
            Problem("the packaged base is damaged", str(base.path), fix="delete this folder: it is built again")
        )
    if problems:
        raise InputError(problems)
    return base


def resolve_config(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    tokenizer: bool = False,
    report: Report = lambda _: None,
) -> tuple[Path, str]:
    """(folder that holds the base's ``config.json``, source); from the hub that file alone is fetched, and with
    ``tokenizer`` the tokenizer's files.

    The names are those of :func:`resolve_base`. Weights are neither fetched nor looked at.
    """
    if not name.strip():
        raise InputError("no base is named", where="base", expected="a folder, a hub id or a packaged name")
    if name in packaged.NAMES or Path(name).expanduser().exists() or not HUB_ID.fullmatch(name):
        base = _find(name, revision, offline, False, report)
        if not (base.path / "config.json").is_file():
            raise InputError(_config_problems(base.path, False, report))
        return base.path, base.source
    from huggingface_hub import hf_hub_download, snapshot_download

    report(f"{name}: asking the hub for its config")
    small = [pattern for pattern in ALLOW if pattern != "*.safetensors"]
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
        if tokenizer:
            commit, ignore = config.parent.name, list(IGNORE)
            snapshot_download(
                name, revision=commit, allow_patterns=small, ignore_patterns=ignore, local_files_only=offline
            )
    except Exception as error:  # the library's own classes, and those of whichever HTTP client it uses
        raise _explain(error, name, revision, offline) from error
    return config.parent, "hub"


def _find(name: str, revision: str | None, offline: bool, trust_remote_code: bool, report: Report) -> ResolvedBase:
    folder = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~", "\\"))
    is_packaged = name in packaged.NAMES
    if not is_packaged and not is_path and not folder.exists() and HUB_ID.fullmatch(name):
        return _from_hub(name, revision, offline, trust_remote_code, report)
    if revision is not None:
        raise InputError(
            "a revision was given, and this base has none",
            where=f"base {name!r}",
            expected="a revision with a hub id only",
            got=f"revision {revision!r} with a {'packaged name' if is_packaged else 'folder'}",
            fix="remove the revision",
        )
    if is_packaged:
        path = packaged.packaged_base(offline=offline, report=report)
        return ResolvedBase(name, path, packaged.REVISION, "packaged")
    if folder.is_dir():
        return ResolvedBase(name, folder.resolve(), None, "folder")
    if folder.exists():
        raise InputError(
            "the base is a file",
            where=f"base {name!r}",
            expected="a folder with config.json, a tokenizer and safetensors weights",
            got=folder.name,
            fix=f"name the folder, such as {str(folder.parent)!r}",
        )
    raise InputError(
        "no such base",
        where=f"base {name!r}",
        expected=f"an existing folder, a hub id org/name, or a packaged name ({', '.join(packaged.NAMES)})",
        got="none of these",
        fix=_near(name) or f"for a first run use `base: {packaged.NAME}`",
    )


def _near(name: str) -> str:
    """The nearest packaged names and the nearest folders beside the missing one; empty if none is near."""
    folder = Path(name).expanduser()
    hints = [nearest(folder.name.lower(), packaged.NAMES), nearest_folder(folder)]
    return " or ".join(filter(None, hints))


def _from_hub(name: str, revision: str | None, offline: bool, trust_remote_code: bool, report: Report) -> ResolvedBase:
    from huggingface_hub import hf_hub_download, snapshot_download

    report(f"{name}: resolving {revision or 'the newest revision'} on the hub")
    allow = [*ALLOW, *(["*.py"] if trust_remote_code else [])]
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
        commit = config.parent.name  # <cache>/models--org--name/snapshots/<commit>/config.json
        problems = _config_problems(config.parent, trust_remote_code, report)
        if problems:
            raise InputError(problems)
        path = snapshot_download(
            name, revision=commit, allow_patterns=allow, ignore_patterns=list(IGNORE), local_files_only=offline
        )
    except TunegateError:
        raise
    except Exception as error:  # the library's own classes, and those of whichever HTTP client it uses
        raise _explain(error, name, revision, offline) from error
    return ResolvedBase(name, Path(path), commit, "hub")


def _explain(error: Exception, name: str, revision: str | None, offline: bool) -> TunegateError:
    """The hub library's error as ours: which of the things that can go wrong it was, and the way out."""
    from huggingface_hub import errors as hub

    where = f"base {name!r}" + (f", revision {revision!r}" if revision else "")
    if isinstance(error, hub.LocalEntryNotFoundError):
        return _not_cached(error, name, where, offline)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return TunegateError(
            f"cannot write the hub cache: {error.strerror}",
            where=str(error.filename or where),
            fix="free some space, or choose another folder with HF_HOME",
        )
    refusal = _refusal(error, name, where)
    if refusal is not None:
        return refusal
    return TunegateError(
        "the hub download failed",
        where=where,
        got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        fix="try again: what was already downloaded is kept",
    )


def _refusal(error: Exception, name: str, where: str) -> InputError | None:
    """What the hub answered, where it answered that this base cannot be had; None for any other error."""
    from huggingface_hub import errors as hub

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    # A gated repository's class derives from the one for a missing repository: the order counts.
    if isinstance(error, hub.GatedRepoError):
        return InputError(
            "the hub repository is gated and this account has no access",
            where=where,
            fix=f"accept its terms at https://huggingface.co/{name}, then {login}",
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        near = _near(name)
        return InputError(
            "no such hub repository, or it is private, and no such folder",
            where=where,
            expected="the id of a model on the hub, or a folder",
            fix=f"check the spelling; if it is private, {login}" + (f"; {near}" if near else ""),
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return InputError(
            "no such revision",
            where=where,
            expected="a branch, tag or commit hash of the repository",
            fix=f"see https://huggingface.co/{name}/commits/main, or leave the revision out",
        )
    if isinstance(error, hub.EntryNotFoundError):
        return InputError(
            "the hub repository has no config.json",
            where=where,
            expected="a whole transformers model",
            fix="an adapter's or GGUF repository names its base model on its page: use that id",
        )
    if isinstance(error, hub.DisabledRepoError):
        return InputError("the hub has disabled this repository", where=where, fix="choose another base")
    if isinstance(error, hub.HFValidationError):
        return InputError("not a hub id", where=where, expected="org/name", got=str(error))
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError("the hub refused access", where=where, got=f"HTTP {status}", fix=login)
    return None


def _not_cached(error: Exception, name: str, where: str, offline: bool) -> InputError:
    from huggingface_hub import constants

    near = _near(name)
    near = f"; {near}" if near else ""
    if offline or constants.HF_HUB_OFFLINE:
        return InputError(
            "the base is not (or not whole) in the hub cache, and downloads are off",
            where=where,
            expected=f"its files below {constants.HF_HUB_CACHE}",
            fix=f"run once without offline mode (HF_HUB_OFFLINE), or give a local folder{near}",
        )
    cause = error.__cause__ or error
    return InputError(
        "the hub cannot be reached, and the base is not in the cache",
        where=where,
        got=f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}",
        fix=f"check the network and proxy; give a local folder; or use `base: {packaged.NAME}`{near}",
    )


def check_folder(folder: Path, *, trust_remote_code: bool = False, report: Report = lambda _: None) -> list[Problem]:
    """Everything wrong with a model folder that can be seen without reading its weights."""
    problems = _config_problems(folder, trust_remote_code, report)
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(set(group) <= present for group in _TOKENIZER_FILES) and not any(
        name.endswith(".tiktoken") for name in present
    ):
        problems.append(
            Problem(
                "no tokenizer",
                str(folder),
                expected="tokenizer.json",
                got="none of " + ", ".join("+".join(group) for group in _TOKENIZER_FILES),
                fix="save the model's tokenizer into the folder: `tokenizer.save_pretrained(folder)`",
            )
        )
    elif "tokenizer.json" in present:
        problems += _unreadable(folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if name in present:
            problems += _unreadable(folder / name)
    found, damage = inspect_weights(folder)
    problems += damage
    if not problems:
        from tunegate.model.bnb_files import stored_quantization

        entries = [entry for part in found.values() for entry in part]
        with collecting(problems):
            stored_quantization(load_object(folder / "config.json"), entries, str(folder))
    return problems


def _unreadable(path: Path) -> list[Problem]:
    try:
        load_object(path)
    except InputError as error:
        return error.problems
    return []


def _config_problems(folder: Path, trust_remote_code: bool, report: Report) -> list[Problem]:
    from tunegate.model.bnb_files import config_problems

    path = folder / "config.json"
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        return [
            Problem(
                "this is an adapter, not a base" if is_adapter else "no config.json",
                str(folder),
                expected="a transformers model folder",
                fix="name the adapter's own base instead" if is_adapter else "check the path",
            )
        ]
    try:
        config = load_object(path)
    except InputError as error:
        return error.problems
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return [Problem("no model_type", str(path), "a name such as 'llama'", repr(model_type))]
    problems = config_problems(config, str(path))
    if config.get("auto_map"):
        problems += _remote_code(path, config, model_type, trust_remote_code, report)
    return problems


def _remote_code(
    path: Path, config: dict[str, Any], model_type: str, trust_remote_code: bool, report: Report
) -> list[Problem]:
    """A config with ``auto_map`` offers Python code from its folder; nothing runs it unasked.

    Where transformers has its own causal class for the type, that one is used and the offer is passed over.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if trust_remote_code:
        report(f"{path.parent}: its own Python code will be run, as asked (trust_remote_code)")
        return []
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        report(f"{path.parent}: its own Python code is not run; transformers defines {model_type!r} itself")
        return []
    return [
        Problem(
            "the base needs its own Python code (auto_map), and code from outside is not run unasked",
            str(path),
            expected="a model type that transformers itself defines",
            got=f"model_type {model_type!r}, auto_map {config['auto_map']}"[:300],
            fix="read that code and set `trust_remote_code: true`, or choose another base",
        )
    ]
