"""MLflow: a run with the settings as params, the scores as metrics and the adapter as artifacts, and a model version
with its fingerprint, decision and state as tags, and the version's aliases.

Through MLflow's own client (``mlflow-skinny`` is enough), which has no process-wide state set. A version that was
published before is found by its content hash: its tags and aliases are brought up to date, nothing is doubled. Of what
a killed push left, a finished run is gone on from; an unfinished one is marked as failed and made anew.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from tunegate.errors import InputError, TunegateError, without_secrets
from tunegate.registry.publish.published import Published

_PARAMS_AT_ONCE, _METRICS_AT_ONCE, _LONGEST = 100, 1000, 6000  # MLflow's limits for a batch and a value
_ID = "tunegate.adapter"


def publish(item: Published, target: str) -> dict[str, Any]:
    uri = target.removeprefix("mlflow:") or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise InputError("which MLflow?", where=target, expected="mlflow:http://HOST:PORT, or MLFLOW_TRACKING_URI set")
    _knock(uri)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError("MLflow's client is not installed", fix="pip install 'tunegate[mlflow]'") from error
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        return _publish(client, item, uri)
    except MlflowException as error:
        raise _failed(uri, error) from error


def _failed(uri: str, error: Exception) -> TunegateError:
    return TunegateError(
        "MLflow refuses or cannot be reached", where=without_secrets(uri),
        got=without_secrets(next(iter(str(error).splitlines()), "")), fix="the same command goes on from there",
    )  # fmt: skip


def _knock(uri: str) -> None:
    """:class:`TunegateError` where nobody listens. MLflow's client would try for minutes before it says so."""
    try:
        place = urlsplit(uri)
        host, port = place.hostname, place.port or {"http": 80, "https": 443}.get(place.scheme)
    except ValueError as error:
        raise InputError("not an address", where=without_secrets(uri), got=str(error)) from None
    behind_proxy = urllib.request.getproxies() and not urllib.request.proxy_bypass(host or "")
    if host and port and not behind_proxy:
        try:
            socket.create_connection((host, port), timeout=10).close()
        except OSError as error:
            raise _failed(uri, error) from error


def _publish(client: Any, item: Published, uri: str) -> dict[str, Any]:
    version, tags = item.version, _tags(item)
    _model(client, version.name)
    number = _known(client, version.name, version.adapter)
    new = number is None
    if number is None:
        run = _run(client, item, tags)
        made = client.create_model_version(
            version.name, source=f"{run.info.artifact_uri}/adapter", run_id=run.info.run_id, tags=tags,
            description=f"{version.ref}: {version.standing}",
        )  # fmt: skip
        number = str(made.version)
    else:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, number, key, value)
    _aliases(client, version.name, number, version.aliases)
    return {"address": f"{uri} {version.name} version {number}", "model": version.name, "number": number, "new": new}


def _model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _known(client: Any, name: str, adapter: str) -> str | None:
    """The model version that is this adapter; None if there is none yet."""
    found = client.search_model_versions(f"name = '{name}' and tag.`{_ID}` = '{adapter}'")
    return str(found[0].version) if found else None


def _run(client: Any, item: Published, tags: dict[str, str]) -> Any:
    """A finished run with everything in it."""
    from mlflow.entities import Metric, Param

    version = item.version
    experiment = client.get_experiment_by_name(version.name)
    place = experiment.experiment_id if experiment else client.create_experiment(version.name)
    for left in client.search_runs([place], f"tags.`{_ID}` = '{version.adapter}'"):
        if left.info.status == "FINISHED":
            return left
        if left.info.status == "RUNNING":
            client.set_terminated(left.info.run_id, "FAILED")
    run = client.create_run(place, run_name=version.ref, tags=tags)
    id, card = run.info.run_id, item.card or {}
    params = [Param(_key(k), v) for k, v in _params(card).items()]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(id, params=params[start : start + _PARAMS_AT_ONCE])
    metrics = [Metric(_key(k), v, 0, 0) for k, v in _metrics(card).items()]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(id, metrics=metrics[start : start + _METRICS_AT_ONCE])
    client.log_artifacts(id, str(item.folder), "adapter")
    client.set_terminated(id)
    return client.get_run(id)


def _key(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", name)


def _params(card: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for inner in value:
                walk(value[inner], f"{key}.{inner}" if key else inner)
        else:
            found[key] = str(value)[:_LONGEST]

    walk(card.get("config") or {}, "")
    return found


def _metrics(card: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for e in card.get("evaluations") or []:
        for name, score in e["scores"].items():
            key = f"{e['split']}.{e['subject']}.{name}"
            found |= {key: score["value"], f"{key}.low": score["low"], f"{key}.high": score["high"]}
    for name in ("train_loss", "valid_loss", "seconds", "tokens_per_second", "steps", "trainable_parameters"):
        value = (card.get("run") or {}).get(name)
        if isinstance(value, (int, float)):
            found[f"run.{name}"] = float(value)
    return found


def _tags(item: Published) -> dict[str, str]:
    version, base = item.version, item.provenance["base"]
    return {
        _ID: version.adapter,
        "tunegate.ref": version.ref,
        "tunegate.state": version.state,
        "tunegate.decision": version.verdict or "not judged",
        "tunegate.override": version.override or "",
        "tunegate.base.name": str(base["name"]),
        "tunegate.base.fingerprint": str(base["fingerprint"]),
    }


def _aliases(client: Any, model: str, number: str, wanted: tuple[str, ...]) -> None:
    """The version's aliases there become those it has here."""
    there = client.get_model_version(model, number).aliases
    for alias in set(there) - set(wanted):
        client.delete_registered_model_alias(model, alias)
    for alias in wanted:
        client.set_registered_model_alias(model, alias, number)
