"""The files of a deployment: systemd units, a Dockerfile, a compose file, Kubernetes objects.

All follow the same rules: an unprivileged user, a read-only file system but for the cache and /tmp, no capabilities,
memory and cores limited to what was planned, a health check by the server's own ``/health``, time to finish what is
under way, and no secret in any file. Readiness asks ``/health``; liveness only whether the port is open, because an
engine that is being started again needs no second restart. The image holds the package versions of the environment that
writes it, since those are what the adapter was measured with.

It builds, starts and deploys nothing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tunegate import __version__
from tunegate.errors import InputError
from tunegate.registry.store import STORES
from tunegate.serve.deploy import KEY, KEY_NAME, PORT, REGISTRY, TARGETS, Deployment, Server, Source, serve_command

USER = 10_001
GRACE = 45  # seconds: --grace's 30, and the engine's end
START = 600  # seconds: a base is fetched, hashed and loaded
CACHE, REGISTRY_PLACE, KEYS_PLACE = "/var/cache/tunegate", "/registry", "/keys"
_DROPPED = ("nvidia-", "cuda-", "triton")  # of torch's CUDA builds; the image takes the CPU build
_SECRETS = {KEY: KEY_NAME, REGISTRY: REGISTRY.lower()}  # as Kubernetes names them
Files = dict[str, str]


def files_for(deployment: Deployment, target: str) -> Files:
    """File names with their texts."""
    writers: dict[str, Callable[[Deployment], Files]] = {
        "systemd": systemd, "docker": docker, "compose": compose, "kubernetes": kubernetes,
    }  # fmt: skip
    if target not in writers:
        raise InputError("no such target", where="--to", expected=", ".join(TARGETS), got=target)
    return writers[target](deployment)


def _place(source: Source, where: str) -> str:
    """What a server in a container loads: the mounted folder, or the name it fetches."""
    return where if source.folder else source.where


def _inside(deployment: Deployment, server: Server) -> list[str]:
    """The command in a container."""
    return serve_command(
        deployment, server, host="0.0.0.0", port=PORT, base=_place(server.base, "/models/base"),
        adapters=[_place(a, f"/models/adapters/{a.name}") for a in server.adapters],
        keys=f"{KEYS_PLACE}/{deployment.keys.name}" if deployment.keys else None,
    )  # fmt: skip


def _mounts(deployment: Deployment, server: Server) -> list[tuple[Path, str, bool]]:
    """(folder here, path in the container, read-only). The keys' folder, since a file alone would stay the old one."""
    return [*_models(deployment, server), *([(deployment.keys.parent, KEYS_PLACE, True)] if deployment.keys else [])]


def _models(deployment: Deployment, server: Server) -> list[tuple[Path, str, bool]]:
    """Those mounts whose content a cluster needs a claim for."""
    found = [(server.base.folder, "/models/base", True)]
    found += [(a.folder, f"/models/adapters/{a.name}", True) for a in server.adapters]
    found.append((deployment.registry_folder, REGISTRY_PLACE, False))  # SQLite locks its file
    return [(folder, place, read_only) for folder, place, read_only in found if folder]


# --- systemd --------------------------------------------------------------------------------------------------------


def systemd(deployment: Deployment) -> Files:
    return {f"{server.name}.service": _unit(deployment, server) for server in deployment.servers}


def _unit(deployment: Deployment, server: Server) -> str:
    folder = deployment.registry_folder
    command = serve_command(
        deployment, server, host="127.0.0.1", port=server.port,
        base=str(server.base.folder or server.base.where),
        adapters=[str(a.folder or a.where) for a in server.adapters],
        keys=str(deployment.keys) if deployment.keys else None,
    )  # fmt: skip
    line = " ".join(_quoted(part) for part in [sys.executable, "-m", "tunegate.cli", *command])
    health = " ".join(_quoted(p) for p in [sys.executable, "-m", "tunegate.serve.health", str(server.port), str(START)])
    read_only = [str(s.folder) for s in (server.base, *server.adapters) if s.folder]
    secrets, file = deployment.secrets, f"/etc/tunegate/{server.name}.env"
    lines = [
        *([f"# Before the first start: {file}, root's, mode 0600, with a line for each of:"] if secrets else []),
        *(f"#   {name}=..." for name in secrets),
        "[Unit]",
        f"Description=tunegate {deployment.kind}: {', '.join(a.name for a in server.adapters) or server.base.where}",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={line}",
        f"ExecStartPost={health}",
        *([f"EnvironmentFile={file}"] if secrets else []),
        "Environment=TUNEGATE_HOME=%C/tunegate HOME=%C/tunegate PYTHONUNBUFFERED=1",
        *(
            [f"Environment={_quoted(f'{REGISTRY}={folder}')}", f"ReadWritePaths={_quoted(str(folder))}"]
            if folder
            else []
        ),
        *(f"ReadOnlyPaths={_quoted(path)}" for path in read_only),
        "DynamicUser=yes",
        "CacheDirectory=tunegate",
        "Restart=on-failure",
        "RestartSec=2",
        f"TimeoutStartSec={START + 10}",
        f"TimeoutStopSec={GRACE}",
        "KillMode=mixed",
        f"MemoryHigh={server.limit_mib - 32}M",
        f"MemoryMax={server.limit_mib}M",
        f"CPUQuota={round(100 * server.sizes.cpus)}%",
        "TasksMax=512",
        *_HARDENING,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


_HARDENING = (
    "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes", "PrivateDevices=yes",
    "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes",
    "ProtectClock=yes", "ProtectHostname=yes", "RestrictNamespaces=yes", "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes", "LockPersonality=yes", "CapabilityBoundingSet=", "AmbientCapabilities=",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service", "UMask=0077",
)  # fmt: skip


def _quoted(text: str) -> str:
    """One word of a unit file: % and $ doubled, the rest in quotes where it needs them."""
    text = text.replace("%", "%%").replace("$", "$$")
    return (
        text if re.fullmatch(r"[\w@%$+=:,./~-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )


# --- containers -----------------------------------------------------------------------------------------------------


def docker(deployment: Deployment) -> Files:
    """Dockerfile, pinned requirements, and a script that runs the first server as compose would."""
    return {**image(deployment), "run.sh": _run_script(deployment)}


def image(deployment: Deployment) -> Files:
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return {
        "Dockerfile": _DOCKERFILE.format(python=python, version=__version__, user=USER, cache=CACHE, port=PORT),
        "requirements.txt": "\n".join(pinned(extras=_extras(deployment))) + "\n",
        ".dockerignore": "*\n!requirements.txt\n!wheels\n",
    }


_DOCKERFILE = """\
# Before the build, in a checkout of tunegate: pip wheel --no-deps -w HERE/wheels .
FROM python:{python}-slim-bookworm AS build
WORKDIR /build
COPY requirements.txt ./
COPY wheels/tunegate-{version}-*.whl ./
RUN python -m venv /opt/tunegate \\
 && /opt/tunegate/bin/pip install --no-cache-dir --no-deps \\
    --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt \\
 && /opt/tunegate/bin/pip install --no-cache-dir --no-deps tunegate-{version}-*.whl

FROM python:{python}-slim-bookworm
LABEL org.opencontainers.image.title="tunegate" org.opencontainers.image.version="{version}"
COPY --from=build /opt/tunegate /opt/tunegate
RUN install -d -o {user} -g {user} {cache}
ENV PATH=/opt/tunegate/bin:$PATH TUNEGATE_HOME={cache} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER {user}:{user}
VOLUME ["{cache}"]
EXPOSE {port}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=3 \\
    CMD ["python", "-m", "tunegate.serve.health", "{port}"]
ENTRYPOINT ["tunegate"]
"""


def _extras(deployment: Deployment) -> tuple[str, ...]:
    """A registry needs its database's driver, and those of its bytes' store, which are taken to be installed where the
    registry is used."""
    if deployment.registry is None:
        return ("serve",)
    database = ("registry-postgres",) if deployment.registry.startswith("postgres") else ()
    return ("serve", *database, *(extra for extra, module in STORES.items() if find_spec(module)))


def pinned(root: str = "tunegate", extras: Iterable[str] = ("serve",)) -> list[str]:
    """``name==version`` of everything that ``root`` with ``extras`` needs, as installed here; CUDA's parts left out."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(root, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            one = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name == root:
                raise InputError("the package is not installed", got=root, fix="pip install it") from None
            raise InputError(
                "a package that the server needs is not installed here, so its version cannot be pinned", got=name,
                fix=f"pip install '{root}[{','.join(extras)}]'",
            ) from None  # fmt: skip
        key = re.sub(r"[-_.]+", "-", name).lower()
        if name != root:
            found[key] = one.version.partition("+")[0]
        for text in one.requires or ():
            needed = Requirement(text)
            marker = needed.marker
            if marker and not any(marker.evaluate({"extra": e}) for e in wanted | {""}):
                continue
            if not needed.name.startswith(_DROPPED):
                waiting.append((needed.name, frozenset(needed.extras)))
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _run_script(deployment: Deployment) -> str:
    lines = [
        "#!/bin/sh", "# Builds the image and runs it. Secrets come from this shell's environment.", "set -eu",
        *(f': "${{{name}:?set it first}}"' for name in deployment.secrets),
        f'docker build -t {shlex.quote(deployment.image)} "$(dirname "$0")"',
    ]  # fmt: skip
    for server in deployment.servers:
        words = [
            "docker", "run", "--detach", "--name", server.name, "--restart", "unless-stopped", "--read-only",
            "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--memory", f"{server.limit_mib}m", "--cpus", f"{server.sizes.cpus:g}", "--pids-limit", "512",
            "--stop-timeout", str(GRACE), "--publish", f"127.0.0.1:{server.port}:{PORT}",
            "--volume", f"{server.name}-cache:{CACHE}",
        ]  # fmt: skip
        for folder, place, read_only in _mounts(deployment, server):
            words += ["--volume", f"{folder}:{place}" + (":ro" if read_only else "")]
        for name in deployment.secrets:
            words += ["--env", name]  # its value is taken from the environment
        words += ["--env", f"{REGISTRY}={REGISTRY_PLACE}"] if deployment.registry_folder else []
        lines.append(shlex.join([*words, deployment.image, *_inside(deployment, server)]))
    return "\n".join(lines) + "\n"


def compose(deployment: Deployment) -> Files:
    services = {server.name: _service(deployment, server) for server in deployment.servers}
    volumes: dict[str, Any] = {f"{server.name}-cache": {} for server in deployment.servers}
    needs = f"; {', '.join(deployment.secrets)} in the environment or in .env" if deployment.secrets else ""
    text = f"# docker compose up --build --wait{needs}\n"
    return {**image(deployment), "compose.yaml": text + _yaml({"services": services, "volumes": volumes})}


def _service(deployment: Deployment, server: Server) -> dict[str, Any]:
    environment = {name: f"${{{name}:?set it}}" for name in deployment.secrets}
    if deployment.registry_folder:
        environment[REGISTRY] = REGISTRY_PLACE
    volumes: list[dict[str, Any]] = [{"type": "volume", "source": f"{server.name}-cache", "target": CACHE}]
    for folder, place, read_only in _mounts(deployment, server):
        volumes.append({"type": "bind", "source": str(folder), "target": place, "read_only": read_only})
    cpus, memory = f"{server.sizes.cpus:g}", f"{server.limit_mib}M"
    return {
        "build": ".",
        "image": deployment.image,
        "command": [part.replace("$", "$$") for part in _inside(deployment, server)],
        "environment": environment,
        "user": f"{USER}:{USER}",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "ports": [f"127.0.0.1:{server.port}:{PORT}"],
        "volumes": volumes,
        "healthcheck": {
            "test": ["CMD", "python", "-m", "tunegate.serve.health", str(PORT)],
            "interval": "15s", "timeout": "5s", "retries": 3, "start_period": f"{START}s",
        },
        "deploy": {
            "resources": {
                "limits": {"cpus": cpus, "memory": memory, "pids": 512},
                "reservations": {"memory": f"{server.request_mib}M"},
            }
        },
        "restart": "unless-stopped",
        "stop_grace_period": f"{GRACE}s",
    }  # fmt: skip


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def kubernetes(deployment: Deployment) -> Files:
    objects = [one for server in deployment.servers for one in _objects(deployment, server)]
    head = [f"# Before: push {deployment.image} to a registry your nodes reach, and"]
    if deployment.secrets:
        files = "".join(f" --from-file={_SECRETS[name]}=FILE" for name in deployment.secrets)
        head.append(f"#   kubectl create secret generic {deployment.name}{files}")
    keys = f"#   kubectl create secret generic {deployment.name}-keys --from-file={deployment.keys}"
    head += [keys] if deployment.keys else []
    for server in deployment.servers:
        for folder, place, _ in _models(deployment, server):
            head.append(f"#   copy {folder} to {place.lstrip('/')} of the claim {server.name}-models")
    return {**image(deployment), "kubernetes.yaml": "\n".join(head) + "\n" + "---\n".join(map(_yaml, objects))}


_ROLLING = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
_ALONE = {"type": "Recreate"}  # a claim that one node holds keeps the next pod waiting on any other


def _objects(deployment: Deployment, server: Server) -> list[dict[str, Any]]:
    labels = {
        "app.kubernetes.io/name": "tunegate", "app.kubernetes.io/instance": server.name,
        "app.kubernetes.io/version": __version__, "app.kubernetes.io/part-of": deployment.name,
    }  # fmt: skip
    chosen = {"app.kubernetes.io/instance": server.name}
    meta = {"name": server.name, "labels": labels}
    mounts = _models(deployment, server)
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(deployment, server, mounts)],
        "volumes": [
            {"name": "cache", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            *([{"name": "models", "persistentVolumeClaim": {"claimName": f"{server.name}-models"}}] if mounts else []),
            *([{"name": "keys", "secret": {"secretName": f"{deployment.name}-keys"}}] if deployment.keys else []),
        ],
    }  # fmt: skip
    found: list[dict[str, Any]] = [
        {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta,
            "spec": {
                "replicas": deployment.replicas,
                "selector": {"matchLabels": chosen},
                "strategy": _ALONE if mounts and deployment.replicas == 1 else _ROLLING,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": meta,
            "spec": {"selector": chosen, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]  # fmt: skip
    if mounts:
        size = sum(f.stat().st_size for folder, _, _ in mounts for f in folder.rglob("*") if f.is_file())
        found.append(
            {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": f"{server.name}-models", "labels": labels},
                "spec": {
                    "accessModes": ["ReadWriteOnce" if deployment.replicas == 1 else "ReadOnlyMany"],
                    "resources": {"requests": {"storage": f"{1 + size * 5 // (4 << 30)}Gi"}},
                },
            }
        )  # fmt: skip
    return found


def _container(deployment: Deployment, server: Server, mounts: Iterable[tuple[Path, str, bool]]) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": deployment.name, "key": _SECRETS[name]}}}
        for name in deployment.secrets
    ]
    if deployment.registry_folder:
        environment.append({"name": REGISTRY, "value": REGISTRY_PLACE})
    memory, cpus = server.limit_mib, server.sizes.cpus
    return {
        "name": "server",
        "image": deployment.image,
        "args": [part.replace("$(", "$$(") for part in _inside(deployment, server)],
        "env": environment,
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {
            "requests": {"cpu": f"{cpus:g}", "memory": f"{server.request_mib}Mi"},
            "limits": {"cpu": f"{cpus:g}", "memory": f"{memory}Mi"},
        },
        "startupProbe": {
            "httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5, "failureThreshold": START // 5,
        },
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 10, "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE},
            {"name": "tmp", "mountPath": "/tmp"},
            *({"name": "models", "mountPath": place, "subPath": place.lstrip("/"), "readOnly": read_only}
              for _, place, read_only in mounts),
            *([{"name": "keys", "mountPath": KEYS_PLACE, "readOnly": True}] if deployment.keys else []),
        ],
    }  # fmt: skip


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False, width=100, allow_unicode=True)
