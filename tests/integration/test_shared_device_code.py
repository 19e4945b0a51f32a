"""Device code that machines share through `index serve`: real nvcc, a real index, two homes for two machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builder.flow import rebuild
from builder.toolchains import device_store
from gracefarm.files import remove_tree
from tests.conftest import Farm, new_farm
from tests.index.index_kit import Server
from tests.integration.test_build import record_of, start
from tests.integration.test_device_store import found_passes, same_but_for_names, tiny_cuda
from tests.integration.test_shared_cache import Builder, changed, server, signed_by, writer

__all__ = ["server", "writer"]

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Built:
    """A build of tiny_cuda."""

    record: dict[str, Any]
    wheel: Path
    said: str

    @property
    def device_entries(self) -> tuple[int, int, int]:
        """Entries of the device store that were used, missing and written."""
        use = self.record["shared_cache"]
        return use["device_hits"], use["device_misses"], use["device_written"]


def built(farm: Farm, *options: str, **variables: str) -> Built:
    done = farm.run("build", "tiny_cuda", "--target", "aarch64", *options, **variables)
    assert done.code == 0, done.said + farm.run("log", "tiny_cuda").out
    return Built(record=record_of(farm, "tiny_cuda"), wheel=Path(done.out.strip()), said=done.said)


def entries(server: Server) -> list[Path]:
    return sorted(path for path in (server.root / "cache" / "device" / "tiny_cuda").rglob("*") if path.is_file())


def kept(farm: Farm) -> list[Path]:
    """The files of a machine's own store."""
    return sorted(path for path in device_store.folder(farm.settings, "tiny_cuda").glob("*/*") if path.is_file())


@pytest.fixture
def reader(writer: Builder, server: Server, shared_home: Path, tmp_path: Path) -> Iterator[Farm]:
    """A second machine with empty caches, which trusts the writer's key."""
    (tmp_path / "writer.pem").write_text(writer.public)
    with new_farm(shared_home) as second:
        home = {name: second.environment[name] for name in ("GRACEFARM_HOME",)}
        trust = {"GRACEFARM_SHARED_CACHE_KEYS": str(tmp_path / "writer.pem"), "GRACEFARM_SHARED_CACHE": server.url}
        settings = {"GRACEFARM_SETTINGS": str(tmp_path / "none.toml")}
        project = {"GRACEFARM_PROJECT": writer.farm.environment["GRACEFARM_PROJECT"]}
        yield replace(second, environment=home | project | trust | settings)


@pytest.fixture
def filled(writer: Builder, server: Server) -> Built:
    """The build whose device code is on the index. ccache is off."""
    tiny_cuda(writer.farm)
    first = built(writer.farm, "--no-compiler-cache", "--shared-cache", "write")
    assert found_passes(first.record) == (0, 0, 0, 2)
    assert first.device_entries == (0, 3, 4)  # a cell for x86_64 reads the fourth
    assert [path.name for path in entries(server)] == [path.name for path in kept(writer.farm)]
    assert f"shared cache {server.url}: device code: 0 entries used, 3 missing, 4 written" in " ".join(first.said.split())
    return first


def test_a_second_machine_compiles_no_device_code(filled: Built, reader: Farm, server: Server) -> None:
    second = built(reader, "--no-compiler-cache")
    assert found_passes(second.record) == (1, 0, 1, 0)
    assert second.device_entries == (3, 0, 0)
    assert second.record["build_id"] == filled.record["build_id"]
    assert same_but_for_names(rebuild.compare(filled.wheel, second.wheel))
    assert len(kept(reader)) == 3
    assert {path.name for path in kept(reader)} < {path.name for path in entries(server)}
    # The machine kept the entries: a second build requests nothing.
    remove_tree(reader.settings.home / "builds")
    third = built(reader, "--no-compiler-cache")
    assert found_passes(third.record) == (1, 0, 1, 0)
    assert third.record["shared_cache"] is None


def test_both_caches_use_one_socket_and_are_counted_separately(writer: Builder, reader: Farm, server: Server) -> None:
    tiny_cuda(writer.farm)
    first = built(writer.farm, "--shared-cache", "write")
    assert first.device_entries == (0, 3, 4)  # a cell for x86_64 reads the fourth
    use = first.record["shared_cache"]
    assert (use["hits"], use["written"]) == (0, len(list((server.root / "cache" / "ccache").rglob("tiny_cuda/*/*"))))
    assert use["written"] > 0
    # With its store off, a machine requests no device code.
    second = built(reader, "--no-device-store", "--no-compiler-cache")
    assert found_passes(second.record) == (0, 0, 0, 2)
    assert second.record["shared_cache"] is None


def strange(path: Path, _: Builder) -> bytes:
    content = path.read_bytes().partition(b"\n")[2]
    return signed_by(Ed25519PrivateKey.generate(), path.name, content, "device/tiny_cuda")


def damaged(path: Path, builder: Builder) -> bytes:
    """An entry of a trusted machine whose result is damaged."""
    content = path.read_bytes().partition(b"\n")[2]
    return signed_by(builder.key, path.name, content[:-1] + b"x", "device/tiny_cuda")


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (strange, "this machine does not trust the key "),
        (lambda path, builder: changed(path, builder, path), "the bytes of the entry differ from the signed bytes"),
        (damaged, ""),
    ],
)
def test_a_wrong_entry_is_refused_and_the_wheel_is_the_same(
    filled: Built, writer: Builder, reader: Farm, server: Server, poison: Callable[[Path, Builder], bytes], words: str
) -> None:
    for path in entries(server):
        path.write_bytes(poison(path, writer))
    second = built(reader, "--no-compiler-cache")
    assert found_passes(second.record) == (0, 0, 0, 2)
    refused = second.record["shared_cache"]["refused"]
    assert len(refused) == (3 if words else 0)
    assert all(entry.startswith("device/tiny_cuda/") and words in entry for entry in refused)
    assert same_but_for_names(rebuild.compare(filled.wheel, second.wheel))
    assert [path.name for path in kept(reader)] == [path.name for path in kept(writer.farm)]


def test_an_index_that_dies_during_a_compile_harms_nothing(filled: Built, reader: Farm, server: Server) -> None:
    running = start(reader, "build", "tiny_cuda", "--target", "aarch64", "--no-compiler-cache")
    deadline = time.monotonic() + 240
    while not kept(reader):  # the first entry has arrived
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.001)
    server.process.kill()
    out, error = running.communicate(timeout=600)
    assert running.returncode == 0, error
    assert same_but_for_names(rebuild.compare(filled.wheel, Path(out.strip())))
