"""What others are told: a plain folder, MLflow (a real tracking server), the Hub (its HTTP API). Object stores stand in
``test_registry_stores.py``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_hub import Hub, fake_hub
from registry_folders import adapter_folder, fingerprint, peft_folder, run_folder
from services import free_port
from task import call
from tunegate.adapter.card import FILES, MANIFEST, check_complete
from tunegate.errors import InputError, TunegateError
from tunegate.registry.adding import add
from tunegate.registry.bases import supersede
from tunegate.registry.entries import Entity, Version, history, resolve
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry, open_registry
from tunegate.registry.publish import push
from tunegate.registry.pulling import PROVENANCE
from tunegate.registry.states import promote


def quiet(text: str) -> None:
    del text


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """support:1 in production against the gate, support:2 a candidate."""
    registry = open_registry(str(tmp_path / "registry"), create=True, who="tester")
    add(registry, read_folder(run_folder(tmp_path / "runs", 1, verdict="hold", score=0.75)))
    add(registry, read_folder(adapter_folder(tmp_path / "two", 2)))
    promote(registry, "support:1", why="x", to="production", override="the customer waits")
    return registry


def find(registry: Registry, reference: str) -> Version:
    with registry.database.reading() as connection:
        return resolve(connection, reference)


# --- a plain layout ----------------------------------------------------------------------------------------------


def test_a_plain_layout(registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "published"
    told = push(registry, "support@production", str(out), quiet)
    folder = out / "support" / "1"
    check_complete(folder)
    assert {p.name for p in folder.iterdir()} == {*FILES, MANIFEST, PROVENANCE}
    said = json.loads((folder / PROVENANCE).read_text())
    assert said["standing"] == "production, hold, OVERRIDE: the customer waits"
    assert said["base"]["fingerprint"] == fingerprint(0).total
    pointer = json.loads((out / "support" / "production.json").read_text())
    assert pointer == {"number": 1, "adapter": find(registry, "support:1").adapter}
    assert told["written"] > 0 and push(registry, "support@production", str(out), quiet)["written"] == 0
    with registry.database.reading() as connection:
        assert history(connection, pointer["adapter"])[-1].what == f"published to {told['address']}"


def test_an_alias_that_went_is_taken_away(registry: Registry, tmp_path: Path) -> None:
    push(registry, "support:1", str(tmp_path / "out"), quiet)
    promote(registry, "support:2", why="x", to="production")
    push(registry, "support:1", str(tmp_path / "out"), quiet)
    pointer = tmp_path / "out" / "support" / "production.json"
    assert not pointer.exists()
    push(registry, "support:2", str(tmp_path / "out"), quiet)
    push(registry, "support:1", str(tmp_path / "out"), quiet)  # another version's pointer stays
    assert json.loads(pointer.read_text())["number"] == 2


def test_a_password_is_neither_said_nor_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is reached by a URL that may hold one."""
    told: list[str] = []
    target = "mlflow:http://ann:secret@127.0.0.1:5000"

    def publish(item: Any, target: str) -> dict[str, Any]:
        assert "secret" in target
        return {"address": f"{target.removeprefix('mlflow:')} support version 1"}

    monkeypatch.setattr("tunegate.registry.publish._publisher", lambda target: publish)
    found = push(registry, "support:1", target, told.append)
    with registry.database.reading() as connection:
        events = history(connection, find(registry, "support:1").adapter)
    assert "http://ann:***@127.0.0.1:5000" in events[-1].what
    assert "secret" not in json.dumps([found, told, [e.what for e in events]])


def test_another_adapter_of_the_same_number_is_not_overwritten(registry: Registry, tmp_path: Path) -> None:
    push(registry, "support:1", str(tmp_path / "published"), quiet)
    other = open_registry(str(tmp_path / "other"), create=True)
    add(other, read_folder(adapter_folder(tmp_path / "three", 3)))
    with pytest.raises(InputError, match="another adapter"):
        push(other, "support:1", str(tmp_path / "published"), quiet)


def test_what_is_not_published(registry: Registry, tmp_path: Path) -> None:
    for target in ("somewhere", "ftp:x"):
        with pytest.raises(InputError, match="not a place"):
            push(registry, "support:1", target, quiet)
    new = fingerprint(1)
    supersede(registry, "tiny", Entity(new.total, "base", "tiny", {"name": "tiny"}), why="x")
    with pytest.raises(InputError, match="superseded"):
        push(registry, "support:1", str(tmp_path / "published"), quiet)
    assert not (tmp_path / "published").exists()


# --- the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def on_hub(hub: Hub, *commands: list[str]) -> list[dict[str, Any]]:
    """Run registry commands against ``hub``, which takes the place of the address that the library read at import."""
    import huggingface_hub.constants as constants

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_test")
        for command in commands:
            said = call("registry", *command, "--json")
            assert said.code == 0, said.out + said.err
            found.append(json.loads(said.out))
    return found


def test_the_hub_there_and_back(hub: Hub, registry: Registry, tmp_path: Path) -> None:
    here, there = str(tmp_path / "registry"), str(tmp_path / "elsewhere")
    pushed, again, back = on_hub(
        hub,
        ["push", "support@production", "hf:team/support", "--registry", here],
        ["push", "support@production", "hf:team/support", "--registry", here],
        ["add", "hf:team/support", "--registry", there],
    )
    repo = hub.repos["team/support"]
    assert repo.private and repo.tags == {"v1": pushed["commit"]}
    # an event of the first push is not in what is said of the version, so the second finds nothing to commit
    assert len(repo.commits) == 2 and again["commit"] == pushed["commit"]
    files = repo.commits[-1]
    assert set(files) == {*FILES, MANIFEST, PROVENANCE}
    assert back["adapter"] == find(registry, "support:1").adapter  # the same content
    assert (back["state"], back["verdict"]) == ("candidate", "hold")  # a state is not taken over from outside

    text = files["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "peft", "tags": ["lora", "tunegate"]}  # the base lay in a folder
    for part in (
        "put in yours",
        fingerprint(0).total, "0.7500", "min_score: fail", "**hold**", "the customer waits", "## Limits", "rows.jsonl",
        "Not judged: whether the base's refusals are as they were", 'PeftModel.from_pretrained(base, "team/support")',
    ):  # fmt: skip
        assert part in text, part


def test_the_hub_keeps_nothing_of_another_adapter(hub: Hub, registry: Registry, tmp_path: Path) -> None:
    """A version without a card after one with a card; and a tag that another registry gave."""
    here, there = str(tmp_path / "registry"), str(tmp_path / "elsewhere")
    add(registry, read_folder(peft_folder(tmp_path / "p", 3), name="bare"))
    add(registry, read_folder(peft_folder(tmp_path / "q", 4, base="org/base"), name="bare"))
    other = open_registry(there, create=True)
    add(other, read_folder(adapter_folder(tmp_path / "other", 9)))
    on_hub(
        hub,
        ["push", "support:1", "hf:team/support", "--registry", here],
        ["push", "bare:2", "hf:team/support", "--registry", here],
    )
    assert set(hub.repos["team/support"].commits[-1]) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", PROVENANCE,
    }  # fmt: skip
    text = hub.repos["team/support"].commits[-1]["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/base" and "put in yours" not in text
    before = len(hub.repos["team/support"].commits)
    with pytest.raises(AssertionError, match="another adapter was published under this tag"):
        on_hub(hub, ["push", "support:1", "hf:team/support", "--registry", there])
    assert len(hub.repos["team/support"].commits) == before


def test_a_hub_repository_without_a_card(hub: Hub, tmp_path: Path) -> None:
    from fake_hub import Repo

    folder = peft_folder(tmp_path / "p", 3)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.repos["someone/lora"] = Repo(False, [{}, {**files, "optimizer.bin": b"x", "evil.py": b"x"}], ["a", "b"])
    (found,) = on_hub(hub, ["add", "hf:someone/lora", "--name", "lora", "--registry", str(tmp_path / "r")])
    assert (found["state"], found["ref"]) == ("unverified", "lora:1")
    assert not any("optimizer" in r or "evil" in r for r in hub.requests)
    said = json.loads(call("registry", "show", "lora:1", "--registry", tmp_path / "r", "--json").out)
    assert (
        said["events"][0]["what"] == f"added as unverified from hf:someone/lora@{hub.repos['someone/lora'].oid()[:12]}"
    )


# --- MLflow ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    port = free_port()
    folder.mkdir()
    command = [
        "timeout", "600", sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
        "--workers", "1",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    import urllib.request

    try:
        end = time.monotonic() + 180
        while time.monotonic() < end and server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.3)
        else:
            raise RuntimeError((folder / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_mlflow(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mlflow", "flask", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from mlflow import MlflowClient

    with mlflow_server(tmp_path / "server") as uri:
        first = push(registry, "support:1", f"mlflow:{uri}", quiet)
        with monkeypatch.context() as patch:  # cut off when the run is finished and no model version there yet
            patch.delattr(MlflowClient, "create_model_version")
            with pytest.raises(AttributeError):
                push(registry, "support:2", f"mlflow:{uri}", quiet)
        second = push(registry, "support:2", f"mlflow:{uri}", quiet)
        again = push(registry, "support:1", f"mlflow:{uri}", quiet)
        assert (first["number"], second["number"], again["number"]) == ("1", "2", "1")
        assert (first["new"], second["new"], again["new"]) == (True, True, False)
        client = MlflowClient(uri, uri)
        version = client.get_model_version_by_alias("support", "production")
        assert version.version == "1" or version.version == 1
        tags = version.tags
        assert tags["tunegate.base.fingerprint"] == fingerprint(0).total
        assert (tags["tunegate.decision"], tags["tunegate.override"]) == ("hold", "the customer waits")
        assert tags["tunegate.adapter"] == find(registry, "support:1").adapter
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED" and run.data.params["train.rank"] == "2"
        assert run.data.metrics["test.adapter.accuracy"] == 0.75 and run.data.metrics["run.steps"] == 8
        got = Path(client.download_artifacts(version.run_id, "adapter", str(tmp_path)))
        check_complete(got)
        promote(registry, "support:2", why="x", to="production")
        push(registry, "support:2", f"mlflow:{uri}", quiet)
        assert int(client.get_model_version_by_alias("support", "production").version) == 2
        assert len(client.search_model_versions("name = 'support'")) == 2
        experiment = client.get_experiment_by_name("support")
        assert experiment is not None and len(client.search_runs([experiment.experiment_id])) == 2


def test_an_mlflow_that_does_not_answer(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TunegateError, match="cannot be reached"):  # at once: MLflow's own client tries for minutes
        push(registry, "support:1", f"mlflow:http://127.0.0.1:{free_port()}", quiet)
    with pytest.raises(InputError, match="not an address"):
        push(registry, "support:1", "mlflow:http://127.0.0.1:x", quiet)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="which MLflow"):
        push(registry, "support:1", "mlflow:", quiet)
