"""A registry's bytes and published adapters on object stores, each a real server with its own protocol: S3 by moto,
Google's by gcp-storage-emulator, Azure's by azurite."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from registry_folders import adapter_folder, kill_at, killed, run_folder
from services import azurite, google_storage, moto_s3
from tunegate.adapter.card import FILES, MANIFEST, check_complete
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_bytes, hash_file
from tunegate.registry.adding import add
from tunegate.registry.entries import list_versions, resolve
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import open_registry
from tunegate.registry.publish import plain, push
from tunegate.registry.pulling import PROVENANCE, pull
from tunegate.registry.states import promote
from tunegate.registry.store import Store
from tunegate.registry.upkeep import collect, verify

BUCKET = "adapters"
AZURITES_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # in its manual
)


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[registry-test]'")


@contextlib.contextmanager
def s3(patch: pytest.MonkeyPatch) -> Iterator[str]:
    needs("s3fs", "moto", "flask", "flask_cors")
    import boto3

    with moto_s3() as endpoint:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield "s3://"


@contextlib.contextmanager
def gs(patch: pytest.MonkeyPatch) -> Iterator[str]:
    needs("gcsfs", "gcp_storage_emulator")
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google what kind of bucket it is
    import fsspec

    patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    with google_storage(BUCKET) as endpoint:
        patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        yield "gs://"


@contextlib.contextmanager
def az(patch: pytest.MonkeyPatch) -> Iterator[str]:
    needs("adlfs")
    if shutil.which("azurite-blob") is None:
        pytest.skip("azurite is not installed: npm install -g azurite")
    from azure.storage.blob import BlobServiceClient

    with azurite() as endpoint:
        parts = f"AccountName=devstoreaccount1;AccountKey={AZURITES_KEY};BlobEndpoint={endpoint}/devstoreaccount1"
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{parts}")
        with BlobServiceClient.from_connection_string(f"DefaultEndpointsProtocol=http;{parts}") as client:
            client.create_container(BUCKET)
        yield "az://"


KINDS: dict[str, Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[str]]] = {
    "s3": s3,
    "gs": gs,
    "az": az,
}


@pytest.fixture(scope="module", params=KINDS)
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    """``s3://`` and the like, with an empty bucket behind it; credentials and endpoint are in the environment."""
    with pytest.MonkeyPatch.context() as patch, KINDS[request.param](patch) as found:
        yield found


@pytest.fixture
def place(scheme: str, tmp_path: Path) -> str:
    """An empty place in the bucket, the test's own."""
    return f"{scheme}{BUCKET}/{hash_bytes(bytes(tmp_path))[3:15]}"


def test_the_store(place: str, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "r"), create=True, store=place)
    folder = run_folder(tmp_path / "runs", 1)
    first, again = add(registry, read_folder(folder)), add(registry, read_folder(folder))
    assert first.uploaded > 0 and again.uploaded == 0
    assert len(list(registry.store.hashes())) == 7
    opened = open_registry(str(tmp_path / "r"))
    pull(opened, "support:1", tmp_path / "out")
    check_complete(tmp_path / "out")
    assert verify(opened).problems == []
    path = opened.store._path(hash_file(folder / "adapter_model.safetensors"))
    data = bytearray(opened.store.fs.cat_file(path))
    data[len(data) // 2] ^= 1
    opened.store.fs.pipe_file(path, bytes(data))
    (problem,) = verify(opened).problems
    assert "changed" in problem.what and path in problem.where
    with pytest.raises(TunegateError, match="changed"):
        pull(opened, "support:1", tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert add(registry, read_folder(folder)).uploaded == len(data) and verify(opened).problems == []
    opened.store.fs.rm_file(path)
    (problem,) = verify(opened).problems
    assert "lost" in problem.what and path in problem.where
    assert add(registry, read_folder(folder)).uploaded == len(data) and verify(opened).problems == []
    for left in (b"left", b""):
        opened.store.put(hash_bytes(left), left)
        assert opened.store.get(hash_bytes(left)) == left
    assert collect(opened).objects == 2 and verify(opened).problems == []


def test_a_part_of_full_size_is_read_back(place: str) -> None:
    """Larger than what any of these stores takes in one request; line ends and boundaries in it are just bytes."""
    from tunegate.registry.store import PART

    text = b"--==0==--\r\n\n\r"
    data = text + blake3(b"seed").digest(length=PART - 2 * len(text)) + text
    store = Store(place)
    assert store.put(hash_bytes(data), data) and not store.put(hash_bytes(data), data)
    assert store.get(hash_bytes(data)) == data and list(store.hashes()) == [hash_bytes(data)]
    assert store.delete(hash_bytes(data)) == PART and store.delete(hash_bytes(data)) == 0


def test_a_bucket_that_is_not_there(scheme: str, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "r"), create=True, store=f"{scheme}missing/store")
    with pytest.raises(TunegateError, match="store"):
        add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    with registry.database.reading() as connection, pytest.raises(InputError):
        resolve(connection, "support:1")


def test_killed_while_adding(place: str, tmp_path: Path) -> None:
    """The registry is as it was, and adding again sends the rest alone."""
    where, intake = str(tmp_path / "r"), read_folder(adapter_folder(tmp_path / "a", 1))
    registry = open_registry(where, create=True, store=place)

    def work() -> None:
        kill_at(Store, "put", 4)
        add(open_registry(where), intake)

    assert killed(work, tmp_path / "error")
    with registry.database.reading() as connection:
        assert list_versions(connection) == []
    assert collect(registry).objects == 0 and len(list(registry.store.hashes())) == 3
    sent = sum(len(registry.store.get(h)) for h in registry.store.hashes())
    whole = sum(path.stat().st_size for path, _ in intake.files.values())
    assert add(registry, intake).uploaded == whole - sent and verify(registry).problems == []


def test_killed_while_pushing(place: str, tmp_path: Path) -> None:
    """The registry is as it was, and the next push completes what lies there."""
    where = str(tmp_path / "r")
    registry = open_registry(where, create=True)
    add(registry, read_folder(adapter_folder(tmp_path / "one", 1)))
    promote(registry, "support:1", why="x", to="production")

    def work() -> None:
        kill_at(plain, "_write", 4)
        push(open_registry(where), "support:1", place, lambda _: None)

    assert killed(work, tmp_path / "error")
    assert verify(registry).problems == []
    store = Store(place)
    store.fs.invalidate_cache()
    names = {Path(p).name for p in store.fs.find(store.root)}
    assert names and PROVENANCE not in names
    told = push(registry, "support:1", place, lambda _: None)
    store.fs.invalidate_cache()
    there = {Path(p).name: p for p in store.fs.find(store.root)}
    assert there.keys() == {*FILES, MANIFEST, PROVENANCE, "production.json"}
    assert (
        told["address"] == f"{place}/support/1" and push(registry, "support:1", place, lambda _: None)["written"] == 0
    )
    add(registry, read_folder(adapter_folder(tmp_path / "two", 2)))
    promote(registry, "support:2", why="x", to="production")
    push(registry, "support:1", place, lambda _: None)
    store.fs.invalidate_cache()
    assert "production.json" not in {Path(p).name for p in store.fs.find(store.root)}


def test_a_store_that_is_no_local_folder(tmp_path: Path) -> None:
    """Any fsspec store: here one in memory."""
    registry = open_registry(str(tmp_path / "r"), create=True, store=f"memory://{tmp_path.name}")
    add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    pull(registry, "support:1", tmp_path / "out")
    check_complete(tmp_path / "out")
    assert verify(registry).problems == []
