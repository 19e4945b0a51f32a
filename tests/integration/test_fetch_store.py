"""The store against a real server with bad manners: resumed, shared, verified, never half visible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.fetch import Download, download, fetch, store_path
from builder.planning.settings import Settings
from builder.planning.sources import File, FileSource
from gracefarm.errors import DigestError, DiskFullError, FetchError
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Served, Server, sha256
from tests.processes import open_files

DATA = os.urandom(3_000_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with fetch_kit.running() as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project=tmp_path)


def wanted(server: Server, data: bytes = DATA, path: str = "/file", **changes: object) -> Download:
    fields: dict[str, object] = {"url": server.url + path, "sha256": sha256(data), "what": "the file", **changes}
    return Download(**fields)  # type: ignore[arg-type]


def left_over(settings: Settings) -> list[Path]:
    """Whatever lies in the store that is not a whole file."""
    return [path for path in (settings.home / "store" / "sha256").rglob("*") if path.is_file() and path.suffix]


def in_another_process(one: Download, settings: Settings) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path\n"
        "from builder.fetch import Download, download; from builder.planning.settings import Settings\n"
        "download([Download(url=sys.argv[1], sha256=sys.argv[2], what='the file')], Settings(home=Path(sys.argv[3])))"
    )
    return subprocess.Popen([sys.executable, "-c", code, one.url, one.sha256, str(settings.home)], text=True)


def wait_for_lock(process: subprocess.Popen[str], one: Download, settings: Settings) -> None:
    """Until the process has the digest's lock file open, and a little more for what it does next; ten seconds without one."""
    lock = settings.home / "store" / "locks" / one.sha256
    for _ in range(100):
        opened = open_files(process.pid)
        time.sleep(0.1)
        if str(lock) in opened:
            return


def test_file_arrives_whole_and_a_second_time_costs_no_network(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA)
    ticks: list[tuple[int, int | None]] = []
    places = download([wanted(server), wanted(server)], settings, lambda done, total, _text: ticks.append((done, total)))
    assert places == {sha256(DATA): store_path(settings, sha256(DATA))}
    assert places[sha256(DATA)].read_bytes() == DATA
    assert ticks[-1] == (len(DATA), len(DATA))
    download([wanted(server)], settings)
    assert len(server.asked) == 1
    assert left_over(settings) == []


def test_many_files_come_and_one_bad_does_not_spoil_those_that_came(server: Server, settings: Settings) -> None:
    blobs = [os.urandom(10_000) for _ in range(30)]
    for number, blob in enumerate(blobs):
        server.served[f"/{number}"] = Served(blob)
    several = [wanted(server, blob, f"/{number}") for number, blob in enumerate(blobs)]
    assert {place.read_bytes() for place in download(several, settings).values()} == set(blobs)
    with pytest.raises(FetchError, match="the file does not exist"):
        download([*several, wanted(server, b"no", "/none")], settings)
    assert all(store_path(settings, download.sha256).exists() for download in several)


def test_wrong_digest_is_refused_and_not_kept(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA)
    with pytest.raises(DigestError) as caught:
        download([wanted(server, b"other")], settings)
    assert sha256(DATA) in caught.value.cause
    assert sha256(b"other") in caught.value.cause
    assert "not kept" in caught.value.remedy
    assert not store_path(settings, sha256(b"other")).exists()
    assert left_over(settings) == []


def test_absent_is_said_at_once(server: Server, settings: Settings) -> None:
    with pytest.raises(FetchError, match=r"the file does not exist: .*/file: HTTP status 404") as caught:
        download([wanted(server)], settings)
    assert "GRACEFARM_MIRRORS" in caught.value.remedy
    assert len(server.asked) == 1


def test_a_server_that_answers_is_not_blamed_on_the_network(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, statuses=[400])
    with pytest.raises(FetchError, match="HTTP status 400: the server did not send the file") as caught:
        download([wanted(server)], settings)
    assert "network" not in caught.value.remedy
    assert len(server.asked) == 1


def test_unreachable_is_said_after_bounded_retries(settings: Settings, unused_port: int) -> None:
    one = Download(url=f"http://127.0.0.1:{unused_port}/file", sha256="0" * 64, what="the file")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1.*cannot be fetched: .*refused.*4 attempts") as caught:
        download([one], settings)
    assert "GRACEFARM_MIRRORS" in caught.value.remedy


@pytest.fixture
def unused_port() -> int:
    with fetch_kit.Server() as closed:
        return int(closed.server_address[1])


def test_passing_trouble_is_waited_out(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, statuses=[503, 429])
    download([wanted(server)], settings)
    assert [request.status for request in server.asked] == [503, 429, 200]


def test_lasting_trouble_ends(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, statuses=[503] * 100)
    with pytest.raises(FetchError, match="HTTP status 503"):
        download([wanted(server)], settings)
    assert len(server.asked) == 4


def test_broken_connections_are_resumed_as_long_as_bytes_come(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, breaks=[500_000] * 5)
    assert download([wanted(server)], settings)[sha256(DATA)].read_bytes() == DATA
    assert [request.range for request in server.asked[1:]] == [f"bytes={500_000 * number}-" for number in range(1, 6)]
    assert {request.if_range for request in server.asked[1:]} == {'"one"'}


def test_server_without_ranges_cannot_keep_us_forever(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, ranges=False, breaks=[500_000] * 100)
    with pytest.raises(FetchError, match="received no new data"):
        download([wanted(server)], settings)
    assert len(server.asked) <= 5


def test_killed_in_the_middle_the_next_run_goes_on(server: Server, settings: Settings) -> None:
    gate = threading.Event()
    served = server.served["/file"] = Served(DATA, gate=gate)
    one = wanted(server)
    partial = store_path(settings, one.sha256).with_name(f"{one.sha256}.partial")
    with in_another_process(one, settings) as process:
        assert served.half.wait(60)
        while not partial.exists() or not partial.stat().st_size:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    gate.set()
    assert not store_path(settings, one.sha256).exists()
    have = partial.stat().st_size
    served.gate = None
    assert download([one], settings)[one.sha256].read_bytes() == DATA
    assert [(request.range, request.if_range, request.status) for request in server.asked] == [
        ("", "", 200),
        (f"bytes={have}-", '"one"', 206),
    ]
    assert left_over(settings) == []


def start_partial(one: Download, settings: Settings, data: bytes, validator: str = "") -> None:
    place = store_path(settings, one.sha256)
    place.parent.mkdir(parents=True)
    place.with_name(f"{one.sha256}.partial").write_bytes(data)
    if validator:
        place.with_name(f"{one.sha256}.validator").write_text(validator)


def test_file_that_changed_on_the_server_is_not_glued_to_the_old_half(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA, etag='"two"')
    start_partial(wanted(server), settings, b"old" * 100, '"one"')
    assert download([wanted(server)], settings)[sha256(DATA)].read_bytes() == DATA
    assert [request.status for request in server.asked] == [200]


def test_spoilt_left_over_is_given_one_fresh_start(server: Server, settings: Settings) -> None:
    server.served["/file"] = Served(DATA)
    start_partial(wanted(server), settings, b"rot" * 100)
    assert download([wanted(server)], settings)[sha256(DATA)].read_bytes() == DATA
    assert [request.status for request in server.asked] == [206, 200]


@pytest.mark.parametrize("left", [DATA, DATA + b"more"], ids=["whole", "too long"])
def test_left_over_as_long_as_the_file_is_judged_by_its_digest(server: Server, settings: Settings, left: bytes) -> None:
    server.served["/file"] = Served(DATA)
    start_partial(wanted(server), settings, left)
    assert download([wanted(server)], settings)[sha256(DATA)].read_bytes() == DATA
    assert [request.status for request in server.asked] == ([416] if left == DATA else [416, 200])


def test_two_processes_that_want_one_file_download_it_once(server: Server, settings: Settings) -> None:
    gate = threading.Event()
    served = server.served["/file"] = Served(DATA, gate=gate)
    one = wanted(server)
    with in_another_process(one, settings) as first:
        assert served.half.wait(60)
        with in_another_process(one, settings) as second:
            wait_for_lock(second, one, settings)
            gate.set()
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(server.asked) == 1
    assert store_path(settings, one.sha256).read_bytes() == DATA


def test_interrupted_wait_for_another_process_ends(server: Server, settings: Settings) -> None:
    gate = threading.Event()
    served = server.served["/file"] = Served(DATA, gate=gate)
    one = wanted(server)
    with in_another_process(one, settings) as first:
        assert served.half.wait(60)
        with in_another_process(one, settings) as second:
            try:
                wait_for_lock(second, one, settings)
                second.send_signal(signal.SIGINT)
                second.wait(20)
                assert first.poll() is None
            finally:
                gate.set()
    assert (first.returncode, second.returncode) == (0, -signal.SIGINT)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_full_disk_is_named_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    server.served["/file"] = Served(DATA)
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "gracefarm-test", home], check=True)
    try:
        settings = Settings(home=home, project=tmp_path)
        with pytest.raises(DiskFullError, match=str(home)) as caught:
            download([wanted(server)], settings)
        assert "GRACEFARM_HOME" in caught.value.remedy
        assert not store_path(settings, sha256(DATA)).exists()
        subprocess.run(["mount", "-o", "remount,size=16m", home], check=True)
        assert download([wanted(server)], settings)[sha256(DATA)].read_bytes() == DATA
        assert server.asked[-1].status == 206
    finally:
        subprocess.run(["umount", home], check=True)


def test_mirror_replaces_the_longest_prefix(server: Server, settings: Settings) -> None:
    server.served["/near/file"] = Served(DATA)
    mirrors = {"https://far.invalid/": "https://wrong.invalid/", "https://far.invalid/a/": f"{server.url}/near/"}
    one = Download(url="https://far.invalid/a/file", sha256=sha256(DATA), what="the file")
    download([one], settings.model_copy(update={"mirrors": mirrors}))
    assert [asked.path for asked in server.asked] == ["/near/file"]


def test_mirror_in_a_folder(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a file").write_bytes(DATA)
    mirrored = settings.model_copy(update={"mirrors": {"https://far.invalid": f"file://{tmp_path}/mirror"}})
    one = Download(url="https://far.invalid/a%20file", sha256=sha256(DATA), what="the file")
    assert download([one], mirrored)[one.sha256].read_bytes() == DATA
    with pytest.raises(FetchError, match=r"does not exist.*no such file"):
        download([Download(url="https://far.invalid/none", sha256="0" * 64, what="the file")], mirrored)


def test_credentials_are_sent_and_never_shown(server: Server, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server.served["/file"] = Served(DATA, password="s3cret")
    with_password = server.url.replace("//", "//user:s3cret@")
    mirrored = settings.model_copy(update={"mirrors": {"https://far.invalid": with_password}})
    one = Download(url="https://far.invalid/file?token=t0ken", sha256=sha256(DATA), what="the file")
    assert download([one], mirrored)[one.sha256].read_bytes() == DATA
    messages = []
    for bad in ("https://far.invalid/none?token=t0ken", "https://far.invalid/file?token=t0ken"):
        with pytest.raises((FetchError, DigestError)) as caught:
            download([Download(url=bad, sha256="0" * 64, what="the file")], mirrored)
        messages += [caught.value.cause, caught.value.remedy, caught.value.repeat]
    assert not [text for text in messages if "s3cret" in text or "t0ken" in text]
    assert "s3cret" not in caplog.text
    with pytest.raises(FetchError, match="401") as caught:
        download([Download(url=f"{server.url}/file", sha256="0" * 64, what="the file")], settings)
    assert "netrc" in caught.value.remedy


def test_bytes_are_those_of_the_file_whatever_encoding_the_server_names(settings: Settings) -> None:
    class Encoding(fetch_kit.Handler):
        def send_header(self, keyword: str, value: str) -> None:
            super().send_header(keyword, value)
            if keyword == "ETag":
                super().send_header("Content-Encoding", "gzip")

    data = fetch_kit.tarball({"a/b": "c"})
    with fetch_kit.running() as server:
        server.RequestHandlerClass = Encoding
        server.served["/file.tar.gz"] = Served(data)
        assert download([wanted(server, data, "/file.tar.gz")], settings)[sha256(data)].read_bytes() == data


def test_unknown_scheme_is_refused(settings: Settings) -> None:
    with pytest.raises(FetchError, match="not an http, https or file URL"):
        download([Download(url="ftp://far.invalid/file", sha256="0" * 64, what="the file")], settings)


def test_file_source_with_further_files(server: Server, settings: Settings) -> None:
    archive, more = fetch_kit.tarball({"thing-1/setup.py": ""}), b"more"
    server.served |= {"/thing.tar.gz": Served(archive), "/more": Served(more)}
    recipe = fetch_kit.recipe(
        FileSource(kind="file", url=f"{server.url}/thing.tar.gz", sha256=sha256(archive)),
        files=(File(url=f"{server.url}/more", sha256=sha256(more), path="third_party/more"),),
    )
    fetched = fetch(recipe.data, settings)
    assert fetched.source.read_bytes() == archive
    assert fetched.files[sha256(more)].read_bytes() == more
