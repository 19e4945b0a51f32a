"""What a cell asks a cluster for, which machines build for a target, and the socket at which ccache asks for entries."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from ray import exceptions

from builder.compiling import ccache_socket, jobs
from builder.compiling.ccache_socket import serving
from builder.farm import code, remote
from builder.farm.cluster import Cluster, Worker
from builder.planning import recipe, stack
from builder.planning.plan import Plan
from builder.planning.stack import Arch, host_arch
from builder.toolchains.ccache import SOCKET
from builder.toolchains.choice import ToolchainChoice
from gracefarm.errors import FarmError
from tests.conftest import REPOSITORY

GIB = 1 << 30
OTHER = next(arch for arch in Arch if arch is not host_arch())


def cluster(*workers: Worker) -> Cluster:
    return Cluster(address="ray://head:10001", workers=workers, foreman=None)


def worker(arch: Arch, cpus: int = 8, memory: int = 64 * GIB) -> Worker:
    return Worker(arch=arch, cpus=cpus, memory=memory)


def plan(target: Arch, hosts: dict[Arch, Arch]) -> Plan:
    loaded = recipe.load(REPOSITORY / "recipes", "causal_conv1d")
    return ToolchainChoice(hosts=hosts).plan(loaded, stack.load(REPOSITORY / "stacks", "cu130"), target)


@pytest.mark.parametrize(
    ("there", "hosts"),
    [
        ([Arch.X86_64], {Arch.AARCH64: Arch.X86_64, Arch.X86_64: Arch.X86_64}),
        ([Arch.AARCH64], {Arch.AARCH64: Arch.AARCH64}),
        ([Arch.AARCH64, Arch.X86_64], {Arch.AARCH64: host_arch(), Arch.X86_64: Arch.X86_64}),
        ([], {}),
    ],
)
def test_which_machines_build_for_a_target(there: list[Arch], hosts: dict[Arch, Arch]) -> None:
    assert cluster(*(worker(arch) for arch in there)).hosts == hosts


def test_a_plan_for_another_machine_has_that_machines_compilers() -> None:
    native, crossed = (plan(Arch.AARCH64, {Arch.AARCH64: host}) for host in (Arch.AARCH64, Arch.X86_64))
    assert (native.host, crossed.host) == (Arch.AARCH64, Arch.X86_64)
    assert native.build_id != crossed.build_id
    assert plan(Arch.AARCH64, {}).host is host_arch()


def test_a_cell_takes_the_smallest_worker_whole_or_what_is_asked_for() -> None:
    made = plan(Arch.X86_64, {Arch.X86_64: Arch.X86_64})
    build = made.recipe.data.build.model_copy(update={"memory_per_job": "2GiB"})
    made = replace(made, recipe=replace(made.recipe, data=made.recipe.data.model_copy(update={"build": build})))
    several = cluster(worker(Arch.X86_64, cpus=16), worker(Arch.X86_64, cpus=4), worker(Arch.AARCH64, cpus=2))
    assert several.share(made, None).cpus == 4
    assert several.share(made, None).memory == 8 * GIB + jobs.OTHERS
    assert several.share(made, 3).cpus == 3
    assert several.share(made, 64).cpus == 4
    small = cluster(worker(Arch.X86_64, memory=3 * GIB))
    assert small.share(made, None).memory == 3 * GIB


def test_no_worker_of_that_architecture_is_one_sentence() -> None:
    made = plan(Arch.X86_64, {Arch.X86_64: Arch.X86_64})
    with pytest.raises(
        FarmError, match="no worker of the Ray cluster can build for x86_64: its workers are aarch64"
    ) as caught:
        cluster(worker(Arch.AARCH64)).share(made, None)
    assert "'{\"x86_64\": 1}'" in caught.value.remedy


def test_the_digest_of_the_code_is_that_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = code.digest()
    assert before == code.digest()
    (tmp_path / "one.py").write_text("1")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    first = code.digest()
    (tmp_path / "one.py").write_text("2")
    assert len({before, first, code.digest()}) == 3
    changed = code.digest()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "one.pyc").write_bytes(b"3")
    assert code.digest() == changed


def test_what_a_build_prints_that_is_no_event_is_passed_over() -> None:
    assert remote.parsed(b"ninja: nothing\n") == remote.parsed(b"[1]\n") == remote.parsed(None) == {}
    assert remote.parsed(b'{"event": "step"}\n') == {"event": "step"}


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (exceptions.TaskCancelledError(), "the build was ended"),
        (exceptions.RayTaskError("build_cell", "", ValueError("first\nlast")), "tiny: last"),
        (exceptions.RayTaskError("build_cell", "", ValueError()), "tiny: no reason was given"),
        (exceptions.RayError("first\nlast"), "tiny: its worker died 4 times: RayError, first"),
        (exceptions.RayError(), "tiny: its worker died 4 times: RayError, no reason was given"),
    ],
)
def test_a_lost_cell_has_a_cause_even_if_ray_says_nothing(error: Exception, cause: str) -> None:
    assert remote.cause_of(error, "tiny", 4) == cause


class Entries:
    """Entries in memory."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    def get(self, kind: str, key: str) -> bytes | None:
        return self.kept.get((kind, key))

    def put(self, kind: str, key: str, content: bytes) -> bool:
        self.kept[kind, key] = content
        return True


@contextmanager
def connected(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(folder / SOCKET))
        assert client.recv(3) == ccache_socket.GREETING
        yield client


def put(client: socket.socket, key: bytes, content: bytes) -> bytes:
    client.sendall(b"\x01" + bytes([len(key)]) + key + b"\x01" + struct.pack("=Q", len(content)) + content)
    return client.recv(1)


def get(client: socket.socket, key: bytes) -> bytes | None:
    client.sendall(b"\x00" + bytes([len(key)]) + key)
    with client.makefile("rb") as stream:
        if stream.read(1) == b"\x01":
            return None
        (size,) = struct.unpack("=Q", stream.read(8))
        return stream.read(size)


def test_the_socket_gives_and_keeps_entries_of_both_kinds(tmp_path: Path) -> None:
    entries = Entries()
    with serving(tmp_path, entries), connected(tmp_path) as client, connected(tmp_path) as other:
        assert get(client, b"\xab\xcd") is None
        assert put(client, b"\xab\xcd", b"object") == b"\x00"
        assert get(other, b"\xab\xcd") == b"object"
        assert put(other, b"device/\x01", bytes(1 << 20)) == b"\x00"
        assert get(client, b"device/\x01") == bytes(1 << 20)
    assert list(entries.kept) == [("ccache", "abcd"), ("device", "01")]
    assert not (tmp_path / SOCKET).exists()


def test_a_client_that_breaks_off_or_asks_for_nonsense_harms_no_other(tmp_path: Path) -> None:
    entries = Entries()
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (tmp_path / "short").symlink_to(deep)
    with serving(deep, entries):
        with connected(tmp_path / "short") as client:
            client.sendall(b"\x01\x02ab\x01" + struct.pack("=Q", 100) + b"half")
        with connected(tmp_path / "short") as client:
            client.sendall(b"\x01\x02ab\x01" + struct.pack("=Q", 1 << 60))
            assert client.recv(1) == b""
        with connected(tmp_path / "short") as client:
            client.sendall(b"\x09")
            assert client.recv(1) == b""
        with connected(tmp_path / "short") as client:
            assert get(client, b"ab") is None
    assert entries.kept == {}
