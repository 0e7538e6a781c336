"""Deployments: memory by hand, files that their own tools read, no secret and no root in any of them."""

from __future__ import annotations

import configparser
import http.server
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunegate.cli import main
from tunegate.errors import InputError
from tunegate.plan.shapes import llama_shape
from tunegate.serve import deploy_files, health
from tunegate.serve.deploy import TARGETS, Deployment, Sizes, memory_of, plan_deployment, unit_name
from tunegate.serve.deploy_files import files_for, pinned

SHAPE = llama_shape("small", (2, 64, 4, 2, 16, 128, 1000), tied=True)
SECRET = "postgresql://me:hunter2@db/registry"


@pytest.fixture(autouse=True)
def some_pins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The development environment need not hold every package of the server's extra."""
    if "real_pins" not in request.keywords:
        monkeypatch.setattr(deploy_files, "pinned", lambda extras: ["fastapi==1.2.3", "torch==2.8.0"])


@pytest.fixture
def multi(tmp_path: Path) -> Deployment:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    sources = [("support", str(folder)), ("billing", "billing@production")]
    template = Deployment("multi", "tunegate", (), SECRET)
    return plan_deployment("multi", "some/base", sources, [SHAPE], Sizes(cpus=1.5), deployment=template)


def separate(**more: Any) -> Deployment:
    sources = [("A b", "a@production"), ("c", "c:3")]
    template = Deployment("separate", "tg", (), "/nowhere")
    return plan_deployment("separate", "some/base", sources, [SHAPE], Sizes(), name="tg", deployment=template, **more)


# --- what is planned ----------------------------------------------------------------------------------------------


def test_memory_by_hand() -> None:
    """2 bytes for each of 64,000 embeddings and 73,728 weights of linear layers, 4 for the 320 of norms."""
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    parts = {part.name: part.bytes for part in memory_of(SHAPE, Sizes(1000, 500, rows=10))}
    assert linear == 73_728 and SHAPE.parameters == 64_000 + linear + 320
    assert parts["weights"] == 2 * (64_000 + linear) + 4 * 320
    assert parts["KV cache"] == 1000 and parts["adapters"] == 500
    assert parts["working"] == 4 * (2048 * (3 * 128 + 4 * 64) + 10 * 1000)
    assert parts["engine"] == parts["front"] == 470_000_000
    small = {part.name: part.bytes for part in memory_of(SHAPE, Sizes(1000, 500, rows=10, quantization="nf4"))}
    assert small["weights"] < parts["weights"] - linear  # 4 bits and scales, where 16 were


def test_the_limit_leaves_a_tenth(multi: Deployment) -> None:
    server = multi.servers[0]
    assert server.limit_mib % 64 == 0 and 1.1 * server.bytes <= server.limit_mib * 2**20 < 1.1 * server.bytes + 2**26
    assert server.request_mib < server.limit_mib


def test_each_adapter_has_a_server_of_its_own() -> None:
    found = separate()
    assert [s.name for s in found.servers] == ["tg-a-b", "tg-c"] and [s.port for s in found.servers] == [8000, 8001]
    assert [[a.name for a in s.adapters] for s in found.servers] == [["A b"], ["c"]]
    two = plan_deployment(
        "separate", None, [("a", "x@p"), ("b", "y@p")], [SHAPE, SHAPE], Sizes(), bases=["base/one", "base/two"]
    )
    assert [s.base.where for s in two.servers] == ["base/one", "base/two"]


@pytest.mark.parametrize(
    ("kind", "base", "adapters", "name", "says"),
    [
        ("merged", "b", [("a", "x")], "n", ["has its adapter in it"]),
        ("multi", "b", [], "n", ["without an adapter"]),
        ("multi", None, [("a", "x"), ("a", "y")], "No_", ["not a name", "what do the servers load", "given twice"]),
        ("separate", "b", [("a b", "x"), ("a-b", "y")], "n", ["units of one name"]),
        ("multi", "b", [("a", SECRET)], "n", ["a password"]),
        ("mutli", "b", [], "n", ["no such kind", "without"]),
    ],
)  # fmt: skip
def test_everything_wrong_is_said_together(kind: Any, base: Any, adapters: Any, name: str, says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        plan_deployment(kind, base, adapters, [SHAPE], Sizes(), name=name)
    assert len(error.value.problems) == len(says)
    for problem, part in zip(error.value.problems, says, strict=True):
        assert part in problem.what


@given(st.text(max_size=60))
def test_unit_names_are_names(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", unit_name(text))


# --- every target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["merged", "multi", "separate"])
def test_no_secret_and_the_whole_command(target: str, kind: str, multi: Deployment) -> None:
    merged = plan_deployment("merged", "some/base", [], [SHAPE], Sizes(quantization="nf4"), name="one")
    deployment = {"merged": merged, "multi": multi, "separate": separate()}[kind]
    text = "\n".join(files_for(deployment, target).values())
    assert "hunter2" not in text and "postgresql://" not in text
    for server in deployment.servers:
        for word in ("some/base", "--api-key-env", "TUNEGATE_API_KEY", *(f"{a.name}=" for a in server.adapters)):
            assert word in text
    assert ("--registry" in text) == (kind != "merged") and ("nf4" in text) == (kind == "merged")


def test_an_unknown_target_is_refused(multi: Deployment) -> None:
    with pytest.raises(InputError, match="no such target"):
        files_for(multi, "nomad")


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_of_keys_and_merged_adapters(target: str, multi: Deployment, tmp_path: Path) -> None:
    """The keys' folder is mounted, because a file by itself would stay the old one; no single key is asked for."""
    keys = tmp_path / "secrets" / "keys.jsonl"
    template = replace(multi, keys=keys, merged=("billing",), registry=None)
    sources = [(a.name, a.where) for a in multi.servers[0].adapters]
    planned = plan_deployment("multi", "some/base", sources, [SHAPE], Sizes(), deployment=template)
    text = files_for(planned, target)[
        {"systemd": "tunegate.service", "docker": "run.sh", "compose": "compose.yaml", "kubernetes": "kubernetes.yaml"}[
            target
        ]
    ]
    assert "TUNEGATE_API_KEY" not in text and "EnvironmentFile" not in text
    words = [word.strip("-\"' ") for line in text.splitlines() for word in re.split(r"\s+", line)]
    assert words.count("merged") == 1 and words[words.index("merged") :][:8].count("billing") == 1
    if target == "systemd":
        assert f"--keys {keys} " in text
        return
    assert "/keys/keys.jsonl" in text
    if target == "docker":
        assert f"{keys.parent}:/keys:ro" in text
    elif target == "compose":
        mount = {"type": "bind", "source": str(keys.parent), "target": "/keys", "read_only": True}
        assert mount in yaml.safe_load(text)["services"]["tunegate"]["volumes"]
    else:
        assert "kubectl create secret generic tunegate-keys --from-file=" + str(keys) in text
        first = next(iter(yaml.safe_load_all(text)))
        jsonschema.validate(first, SCHEMAS["Deployment"])
        spec = first["spec"]["template"]["spec"]
        assert {"name": "keys", "secret": {"secretName": "tunegate-keys"}} in spec["volumes"]
        assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in spec["containers"][0]["volumeMounts"]
        assert f"copy {keys.parent}" not in text


def test_merged_adapters_must_be_there_and_take_memory(multi: Deployment) -> None:
    sources = [(a.name, a.where) for a in multi.servers[0].adapters]
    with pytest.raises(InputError, match=r"--merged: no adapter of this name(.|\n)*did you mean 'billing'"):
        plan_deployment("multi", "b", sources, [SHAPE], Sizes(), deployment=replace(multi, merged=("biling",)))
    with pytest.raises(InputError, match="has its adapter in it already"):
        plan_deployment("merged", "b", [], [SHAPE], Sizes(), deployment=replace(multi, merged=("billing",)))
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    for sizes in (Sizes(), Sizes(quantization="nf4")):
        parts = {part.name: part.bytes for part in memory_of(SHAPE, sizes, merged=3)}
        assert parts["merged"] == 3 * 2 * linear  # 16 bits, over 4 bits too
    assert "merged" not in {part.name for part in memory_of(SHAPE, Sizes())}


# --- systemd ------------------------------------------------------------------------------------------------------


def unit(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, mark, value = line.partition("=")
        if mark and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_a_unit_is_confined(multi: Deployment, tmp_path: Path) -> None:
    text = files_for(multi, "systemd")["tunegate.service"]
    found = unit(text)
    server = multi.servers[0]
    assert found["DynamicUser"] == ["yes"] and found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == [""] and found["NoNewPrivileges"] == ["yes"]
    assert found["MemoryMax"] == [f"{server.limit_mib}M"] and found["CPUQuota"] == ["150%"]
    assert (
        found["EnvironmentFile"] == ["/etc/tunegate/tunegate.env"]
        and "tunegate.serve.health" in found["ExecStartPost"][0]
    )
    assert found["ReadOnlyPaths"] == [f'"{tmp_path / "my adapter"}"']
    command = shlex.split(found["ExecStart"][0])
    assert command[command.index("--adapter") + 1] == f"support={tmp_path / 'my adapter'}"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    configparser.ConfigParser(strict=False, interpolation=None).read_string(
        text.partition("[Unit]")[1] + text.partition("[Unit]")[2]
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_takes_the_units(multi: Deployment, tmp_path: Path) -> None:
    for name, text in {**files_for(multi, "systemd"), **files_for(separate(), "systemd")}.items():
        path = tmp_path / name
        path.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        mine = [line for line in done.stderr.splitlines() if name in line]
        assert mine == [] and "hunter2" not in text


@pytest.mark.parametrize("word", ["a b", 'say "x"', "50%", "$HOME", "back\\slash", "plain-1.0=x"])
def test_words_of_a_unit_come_back(word: str) -> None:
    quoted = deploy_files._quoted(word)
    assert shlex.split(quoted.replace("$$", "$").replace("%%", "%")) == [word]


# --- containers ---------------------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def test_the_dockerfile_keeps_the_usual_rules(multi: Deployment) -> None:
    """hadolint's: DL3006/7 pinned bases, DL3002 not root at the end, DL3013 pinned packages, DL3042 no pip cache,
    DL3025 JSON forms, DL3020 COPY not ADD, one HEALTHCHECK, and no secret as ENV or ARG."""
    files = files_for(multi, "docker")
    found = instructions(files["Dockerfile"])
    names = [name for name, _ in found]
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm( AS \w+)?", v) for n, v in found if n == "FROM")
    assert [v for n, v in found if n == "USER"] == ["10001:10001"] and names.index("USER") > names.index(
        "HEALTHCHECK"
    ) - 9
    assert names[-1] == "ENTRYPOINT" and names.count("HEALTHCHECK") == 1 and not {"ADD", "ARG"} & set(names)
    for name, value in found:
        if name in ("ENTRYPOINT", "CMD", "VOLUME"):
            assert value.startswith("[")
        if name == "RUN":
            assert all("--no-cache-dir" in part for part in value.split("&&") if "pip install" in part)
            assert "apt-get" not in value and "sudo" not in value
        if name == "ENV":
            assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", value)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in files["requirements.txt"].splitlines())


def test_the_run_script_is_one(multi: Deployment, tmp_path: Path) -> None:
    """A ``docker`` that writes down what it is asked; the script stops without the secrets."""
    files = files_for(multi, "docker")
    (tmp_path / "run.sh").write_text(files["run.sh"])
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word" >> {shlex.quote(str(tmp_path))}/asked; done\n')
    fake.chmod(0o755)
    path = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    run = ["sh", str(tmp_path / "run.sh")]
    without = subprocess.run(run, env=path, capture_output=True, text=True, check=False)
    assert without.returncode != 0 and "TUNEGATE_API_KEY" in without.stderr and not (tmp_path / "asked").exists()
    subprocess.run(run, env={**path, "TUNEGATE_API_KEY": "k", "TUNEGATE_REGISTRY": SECRET}, check=True)
    words = (tmp_path / "asked").read_text().splitlines()
    assert "--read-only" in words and words[words.index("--cap-drop") + 1] == "ALL"
    assert f"{tmp_path / 'my adapter'}:/models/adapters/support:ro" in words and "k" not in words
    assert words[words.index("--env") + 1] == "TUNEGATE_API_KEY" and words[-1] != "tunegate:local"


def test_compose_is_confined_and_sized(multi: Deployment, tmp_path: Path) -> None:
    found = yaml.safe_load(files_for(multi, "compose")["compose.yaml"])
    service = found["services"]["tunegate"]
    server = multi.servers[0]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["user"] == "10001:10001"
    assert service["deploy"]["resources"]["limits"] == {"cpus": "1.5", "memory": f"{server.limit_mib}M", "pids": 512}
    assert service["environment"] == {
        "TUNEGATE_API_KEY": "${TUNEGATE_API_KEY:?set it}", "TUNEGATE_REGISTRY": "${TUNEGATE_REGISTRY:?set it}",
    }  # fmt: skip
    binds = [v for v in service["volumes"] if v["type"] == "bind"]
    assert binds == [{"type": "bind", "source": str(tmp_path / "my adapter"),
                      "target": "/models/adapters/support", "read_only": True}]  # fmt: skip
    assert (
        "billing=billing@production" in service["command"] and "support=/models/adapters/support" in service["command"]
    )
    assert service["healthcheck"]["test"][:2] == ["CMD", "python"] and service["ports"] == ["127.0.0.1:8000:8000"]
    assert set(found["volumes"]) == {"tunegate-cache"}


def test_a_registry_folder_is_mounted(tmp_path: Path) -> None:
    template = Deployment("multi", "tg", (), str(tmp_path))
    planned = plan_deployment("multi", "some/base", [("a", "a@p")], [SHAPE], Sizes(), name="tg", deployment=template)
    service = yaml.safe_load(files_for(planned, "compose")["compose.yaml"])["services"]["tg"]
    assert service["environment"]["TUNEGATE_REGISTRY"] == "/registry"
    assert {"type": "bind", "source": str(tmp_path), "target": "/registry", "read_only": False} in service["volumes"]
    assert planned.secrets == ("TUNEGATE_API_KEY",)
    text = files_for(planned, "systemd")["tg.service"]
    assert unit(text)["ReadWritePaths"] == [str(tmp_path)]


# --- Kubernetes ---------------------------------------------------------------------------------------------------

_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi)?$"}
_META = {
    "type": "object", "required": ["name", "labels"], "additionalProperties": False,
    "properties": {"name": _NAME, "labels": {"additionalProperties": {"pattern": r"^[\w.-]{1,63}$"}}},
}  # fmt: skip
_PROBE = {
    "type": "object", "additionalProperties": False, "required": ["periodSeconds", "failureThreshold"],
    "properties": {"httpGet": {"required": ["path", "port"]}, "tcpSocket": {"required": ["port"]},
                   "periodSeconds": {"type": "integer"}, "failureThreshold": {"type": "integer"}},
}  # fmt: skip
_CONTAINER = {
    "type": "object", "additionalProperties": False, "required": ["name", "image", "resources", "securityContext"],
    "properties": {
        "name": _NAME, "image": {"type": "string"}, "args": {"type": "array", "items": {"type": "string"}},
        "env": {"items": {"required": ["name"], "oneOf": [{"required": ["value"]}, {"required": ["valueFrom"]}]}},
        "ports": {"items": {"required": ["containerPort"]}},
        "resources": {
            "required": ["requests", "limits"],
            "properties": {k: {"additionalProperties": _QUANTITY, "required": ["cpu", "memory"]}
                           for k in ("requests", "limits")},
        },
        "startupProbe": _PROBE, "readinessProbe": _PROBE, "livenessProbe": _PROBE,
        "securityContext": {"properties": {"readOnlyRootFilesystem": {"const": True},
                                           "allowPrivilegeEscalation": {"const": False},
                                           "capabilities": {"const": {"drop": ["ALL"]}}},
                            "required": ["readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"]},
        "volumeMounts": {"items": {"required": ["name", "mountPath"], "additionalProperties": False,
                                   "properties": {n: {} for n in ("name", "mountPath", "subPath", "readOnly")}}},
    },
}  # fmt: skip
_POD = {
    "type": "object", "additionalProperties": False, "required": ["containers", "securityContext", "volumes"],
    "properties": {
        "automountServiceAccountToken": {"const": False}, "terminationGracePeriodSeconds": {"type": "integer"},
        "securityContext": {"required": ["runAsNonRoot", "runAsUser", "seccompProfile"],
                            "properties": {"runAsNonRoot": {"const": True}, "runAsUser": {"minimum": 1}}},
        "containers": {"type": "array", "minItems": 1, "items": _CONTAINER},
        "volumes": {"items": {"required": ["name"], "maxProperties": 2, "minProperties": 2}},
    },
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "Deployment": {
        "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "apps/v1"}, "kind": {}, "metadata": _META,
            "spec": {
                "required": ["replicas", "selector", "template"], "additionalProperties": False,
                "properties": {
                    "replicas": {"type": "integer", "minimum": 1}, "selector": {"required": ["matchLabels"]},
                    "strategy": {"required": ["type"]},
                    "template": {"required": ["metadata", "spec"], "properties": {"spec": _POD}},
                },
            },
        },
    },
    "Service": {
        "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False,
        "properties": {"apiVersion": {"const": "v1"}, "kind": {}, "metadata": _META,
                       "spec": {"required": ["selector", "ports"]}},
    },
    "PersistentVolumeClaim": {
        "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False,
        "properties": {"apiVersion": {"const": "v1"}, "kind": {}, "metadata": _META,
                       "spec": {"required": ["accessModes", "resources"],
                                "properties": {"resources": {"properties": {"requests": {
                                    "additionalProperties": _QUANTITY}}}}}},
    },
}  # fmt: skip


def objects(deployment: Deployment) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(files_for(deployment, "kubernetes")["kubernetes.yaml"])


def test_kubernetes_objects_have_their_form(multi: Deployment) -> None:
    found = [*objects(multi), *objects(replace(separate(), replicas=3))]
    assert [one["kind"] for one in found] == [
        "Deployment", "Service", "PersistentVolumeClaim", "Deployment", "Service", "Deployment", "Service",
    ]  # fmt: skip
    for one in found:
        jsonschema.validate(one, SCHEMAS[one["kind"]])


def test_a_registry_in_a_folder_is_for_one_replica(tmp_path: Path) -> None:
    template = Deployment("multi", "tg", (), str(tmp_path), replicas=2)
    with pytest.raises(InputError, match=r"--replicas.*\n?.*one machine|one machine.*\n?.*--replicas"):
        plan_deployment("multi", "some/base", [("a", "a@production")], [SHAPE], Sizes(), deployment=template)


def test_kubernetes_parts_fit_together(multi: Deployment) -> None:
    deployment, service, claim = objects(multi)
    spec = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert (
        deployment["spec"]["selector"]["matchLabels"].items() <= labels
        and service["spec"]["selector"].items() <= labels
    )
    container = spec["containers"][0]
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [claim["metadata"]["name"]]
    server = multi.servers[0]
    assert container["resources"]["limits"] == {"cpu": "1.5", "memory": f"{server.limit_mib}Mi"}
    assert container["resources"]["requests"]["memory"] == f"{server.request_mib}Mi"
    secrets = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
    assert secrets["TUNEGATE_API_KEY"] == {"name": "tunegate", "key": "api-key"} and "TUNEGATE_REGISTRY" in secrets
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}  # the claim is for one node at a time
    assert next(iter(objects(separate())))["spec"]["strategy"]["type"] == "RollingUpdate"
    assert container["livenessProbe"].get("httpGet") is None  # an engine that restarts is not ready, but alive


# --- pins, health, the command ------------------------------------------------------------------------------------


def test_pins_are_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    class Fake:
        def __init__(self, version: str, *requires: str):
            self.version, self.requires = version, list(requires)

    installed = {
        "tunegate": Fake("0.1", "Torch>=2", "x[fast]>1; python_version >= '3.0'", "never; python_version < '3.0'",
                         "fastapi; extra == 'serve'", "pytest; extra == 'dev'"), "pytest": Fake("8"),
        "Torch": Fake("2.8.0+cpu", "nvidia-cublas-cu12", "triton"), "y_z": Fake("3"), "fastapi": Fake("0.9"),
        "x": Fake("1.5", "y_z; extra == 'fast'", "tunegate"),
    }  # fmt: skip

    def distribution(name: str) -> Fake:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert pinned() == ["fastapi==0.9", "torch==2.8.0", "x==1.5", "y-z==3"]
    assert pinned(extras=("serve", "dev")) == ["fastapi==0.9", "pytest==8", "torch==2.8.0", "x==1.5", "y-z==3"]
    del installed["y_z"]
    with pytest.raises(InputError, match="y_z"):
        pinned()


def test_an_image_can_reach_its_registry(multi: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def pins(extras: tuple[str, ...]) -> list[str]:
        asked.append(extras)
        return []

    monkeypatch.setattr(deploy_files, "pinned", pins)
    monkeypatch.setattr(deploy_files, "find_spec", lambda module: module == "s3fs" or None)
    for registry in ("postgresql+psycopg://db/x", "/a/folder", None):
        files_for(replace(multi, registry=registry), "docker")
    assert asked == [("serve", "registry-postgres", "s3"), ("serve", "s3"), ("serve",)]


def test_health_asks_until_it_is_answered() -> None:
    status = [503, 503, 200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status.pop(0) if len(status) > 1 else status[0])
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert health.main([str(port)]) == 1
        assert health.main([str(port), "10"]) == 0
        server.shutdown()
    assert health.main([str(port)]) == 1


def test_the_command_writes_and_overwrites_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "a"
    adapter.mkdir()
    line = ["deploy", "multi", "--to", "systemd", "-o", str(tmp_path / "out"), "--base", str(tiny_llama),
            "--adapter", f"a={adapter}", "--kv-cache", "256MiB"]  # fmt: skip
    assert main(line) == 0
    assert "limit" in capsys.readouterr().out and (tmp_path / "out" / "tunegate.service").is_file()
    assert main(line) == 2 and "stand there already" in capsys.readouterr().err
    assert main([*line[:-3], "b=nowhere"]) == 2 and "neither folders nor references" in capsys.readouterr().err
    keys = ["--keys", str(tmp_path / "none")]
    assert main([*line, *keys]) == 2 and "no file of keys" in capsys.readouterr().err
    assert main([*line[:-3], "b=b@production"]) == 2 and "which registry" in capsys.readouterr().err
