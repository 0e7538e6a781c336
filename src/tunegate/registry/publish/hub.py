"""The Hugging Face Hub: one commit with the adapter, its card and a model card, and a tag ``v<number>``.

Through ``huggingface_hub``. A repository that is not there is made private. The README becomes a model card with base,
data, scores, decision, limits and how to load; the manifest follows it, so the repository is a complete adapter folder
and `tunegate registry add hf:OWNER/NAME` gives the same version back. A file of an adapter that was there before and
that this one has not (a card, its manifest) goes with the same commit. A tag that is another adapter's is refused.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tunegate.adapter.card import FILES, MANIFEST, README
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_file, read_json, write_json, write_text
from tunegate.registry.hub import SCHEME
from tunegate.registry.publish.model_card import model_card
from tunegate.registry.publish.published import Published
from tunegate.registry.pulling import PROVENANCE


def publish(item: Published, target: str) -> dict[str, Any]:
    from huggingface_hub import HfApi

    repo, version, api = target.removeprefix(SCHEME).strip("/"), item.version, HfApi()
    with tempfile.TemporaryDirectory(prefix="tunegate-hub-") as scratch:
        folder = _folder(item, Path(scratch), repo)
        try:
            api.create_repo(repo, private=True, exist_ok=True, repo_type="model")
            _refuse_another(api, repo, item, target)
            message = f"{version.ref}: {version.standing}".splitlines()[0][:200]
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=[*FILES, MANIFEST, PROVENANCE]
            )
            api.create_tag(repo, tag=f"v{version.number}", revision=commit.oid, exist_ok=True)
        except TunegateError:
            raise
        except Exception as error:  # the library's own classes, and those of whichever HTTP client it uses
            raise TunegateError(
                "the hub refuses or cannot be reached", where=target, got=f"{type(error).__name__}: {error}",
                expected="hf:OWNER/NAME, a repository that this account may write",
                fix="log in with `hf auth login` or set HF_TOKEN; the same command goes on from there",
            ) from error  # fmt: skip
    return {"address": f"{target}@{commit.oid[:12]}", "commit": commit.oid, "tag": f"v{version.number}"}


def _refuse_another(api: Any, repo: str, item: Published, target: str) -> None:
    """:class:`InputError` if this version's tag is there and its commit holds another adapter."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    tag = f"v{item.version.number}"
    with tempfile.TemporaryDirectory(prefix="tunegate-hub-") as scratch:
        try:
            path = api.hf_hub_download(repo, PROVENANCE, revision=tag, local_dir=scratch)
        except RevisionNotFoundError:
            return
        except EntryNotFoundError:
            path = None
        found = read_json(path).get("adapter") if path else "something that tunegate did not publish"
    if found != item.version.adapter:
        raise InputError(
            "another adapter was published under this tag", where=f"{target}@{tag}", expected=item.version.adapter,
            got=str(found), fix="publish to another repository: two registries gave the same number",
        )  # fmt: skip


def _folder(item: Published, scratch: Path, repo: str) -> Path:
    """What goes up: the adapter's files with the model card as README."""
    folder = scratch / "adapter"
    folder.mkdir()
    for path in item.paths:
        shutil.copyfile(path, folder / path.name)
    write_text(folder / README, model_card(item, repo))
    if (folder / MANIFEST).exists():
        write_json(folder / MANIFEST, {name: hash_file(folder / name) for name in FILES})
    write_json(folder / PROVENANCE, item.provenance)
    return folder
