"""Compares the index with pypiserver, devpi, and nginx with an exported tree. All servers run on this machine, in one run.

`GRACEFARM_BENCH_SCALE=0.01 python -m bench index` tests the benchmark with 1% of the size. Its figures mean nothing.
`GRACEFARM_BENCH_BEFORE=FOLDER` also measures the index of another checkout, for example of `git worktree add FOLDER HEAD~1`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import httpx

from bench._index_servers import Running, fill, free_port, index, nginx, ours, own_environment, process, pypiserver, run, wheel
from builder.planning import settings
from gracefarm.files import remove_tree

Make = Callable[[], AbstractContextManager["Running"]]

SCALE = float(os.environ.get("GRACEFARM_BENCH_SCALE", "1"))
MANY = max(20, int(10_000 * SCALE))
UPLOADS = max(40, int(1500 * SCALE))
DOWNLOADS = 9
BIG = max(1 << 20, int((400 << 20) * SCALE))
VARIANT = max(1 << 20, int((200 << 20) * SCALE))
SECONDS = 8 if SCALE >= 1 else 2

OURS = ("gracefarm", "before")
BEFORE = Path(os.environ["GRACEFARM_BENCH_BEFORE"]).resolve() if "GRACEFARM_BENCH_BEFORE" in os.environ else None
JSON = "application/vnd.pypi.simple.v1+json"


def rate(url: str, *, connections: int = 8, token: str = "") -> float:
    """Requests per second for one page, by wrk. With `token`, each request has an Authorization header."""
    headers = ["-H", f"Accept: {JSON}, text/html;q=0.1"]
    if token:
        headers += ["-H", f"Authorization: Basic {base64.b64encode(f'__token__:{token}'.encode()).decode()}"]
    text = run("wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", *headers, url)
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    if errors:
        raise SystemExit(f"{url}: {errors[0]}")
    match = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert match, text
    return float(match[1])


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


@dataclass
class Verdicts:
    """The figures that have a target. The last table lists them."""

    rows: list[list[str]] = field(default_factory=list)

    def add(self, what: str, value: float, bound: float, *, most: bool = False, unit: str = "") -> None:
        """Add a figure with its target."""
        good = value <= bound if most else value >= bound
        target = f"{'at most' if most else 'at least'} {bound:g}{unit}"
        self.rows.append([what, f"{value:.3g}{unit}", target, "met" if good else "**not met**"])


def pages(work: Path, verdicts: Verdicts) -> None:
    """Measure the rate of a page at 10 and at MANY wheels, and the time until the server is ready."""
    rates: dict[tuple[str, int], float] = {}
    start = 0.0
    for count in (10, MANY):
        folder, root, tree = work / f"wheels{count}", work / f"root{count}", work / f"tree{count}"
        fill(folder, count)
        index(root, "import", folder)
        index(root, "export", tree)
        page = "/simple/pkg-00000/"
        servers: list[Make] = [partial(ours, root), partial(pypiserver, folder), partial(nginx, tree, work)]
        if BEFORE:
            index(work / f"before{count}", "import", folder, checkout=BEFORE)
            servers.append(partial(ours, work / f"before{count}", checkout=BEFORE))
        for make in servers:
            with make() as server:
                httpx.get(server.url + page, timeout=60).raise_for_status()
                rates[server.name, count] = statistics.median(rate(server.url + page) for _ in range(3))
                if server.token:
                    with_token = statistics.median(rate(server.url + page, token=server.token) for _ in range(3))
                    rates[f"{server.name}, Authorization sent", count] = with_token
                start = server.started_s if server.name == "gracefarm" else start
    if devpi := devpi_rate(work):
        rates["devpi", 10] = devpi
    names = list(dict.fromkeys(name for name, _ in rates))
    rows = [
        [name, *(f"{rates[name, count]:.0f}" if (name, count) in rates else "-" for count in (10, MANY))] for name in names
    ]
    table("A page, requests per second (access log on)", ["server", "10 wheels", f"{MANY} wheels"], rows)
    print("\nAll these servers allow reading without a login, so they do not check the Authorization header.")
    for count in (10, MANY):
        mine, theirs = rates["gracefarm", count], rates["pypiserver", count]
        verdicts.add(f"page at {count} wheels, rate / pypiserver's rate", mine / theirs, 10 if count == 10 else 1000)
        verdicts.add(f"page at {count} wheels, rate / rate of nginx (static)", mine / rates["nginx", count], 0.5)
        if BEFORE:
            verdicts.add(f"page at {count} wheels, rate / the other checkout's rate", mine / rates["before", count], 0.9)
    verdicts.add(f"page, rate at {MANY} wheels / rate at 10", rates["gracefarm", MANY] / rates["gracefarm", 10], 0.8)
    verdicts.add(f"start at {MANY} wheels", start, 1.0, most=True, unit=" s")


def devpi_rate(work: Path) -> float | None:
    """The rate of devpi at ten wheels. devpi takes most of an hour to load MANY wheels, so that is not measured."""
    home = work / "devpi"
    try:
        own_environment(home, "devpi-server", "devpi-client")
        run(home / "bin/devpi-init", "--serverdir", home / "data", "--no-root-pypi")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"devpi cannot be installed: {error}")
        return None
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [home / "bin/devpi-server", "--serverdir", home / "data", "--port", port]
    with process("devpi", command, url, "/+api"):
        client = [home / "bin/devpi", "--clientdir", home / "client"]
        for arguments in (
            ["use", url],
            ["login", "root", "--password="],
            ["index", "-c", "root/dev", "bases="],
            ["use", "root/dev"],
        ):
            run(*client, *arguments)
        run(*client, "upload", *sorted((work / "wheels10").iterdir()))
        return statistics.median(rate(url + "/root/dev/+simple/pkg-00000/") for _ in range(3))


def memory(pid: int) -> int:
    """Peak resident memory of the process in bytes, since the last call of `forget`."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert match
    return int(match[1]) * 1024


def forget(pid: int) -> int:
    """Reset the peak of resident memory. Return the current resident memory in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory(pid)


def post(server: Running, path: Path) -> float:
    """Seconds of an upload with curl."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    begin = time.monotonic()
    run(
        *("curl", "-sS", "--fail-with-body", "-o", os.devnull, "-u", f"__token__:{server.token}"),
        *("-F", ":action=file_upload", "-F", f"sha256_digest={digest}", "-F", f"content=@{path}"),
        server.url + ("/legacy/" if server.name in OURS else "/"),
    )
    return time.monotonic() - begin


def large_upload(work: Path, verdicts: Verdicts) -> None:
    """Measure one large upload, its memory, and the time of another client's page during the upload."""
    name, content = wheel("big_cuda", "1.0", payload=os.urandom(BIG))
    path = work / name
    path.write_bytes(content)
    del content
    waits: list[float] = []
    finished = threading.Event()

    def read(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not finished.is_set():
                begin = time.monotonic()
                client.get("/simple/").raise_for_status()
                waits.append(time.monotonic() - begin)
                time.sleep(0.002)

    with ours(work / "root-big") as server:
        before = forget(server.pid)
        reader = threading.Thread(target=read, args=(server.url,))
        reader.start()
        mine = post(server, path)
        finished.set()
        reader.join()
        growth = memory(server.pid) - before
        download(server, work, path, verdicts)
    folder = work / "pypiserver-big"
    folder.mkdir()
    with pypiserver(folder) as server:
        theirs = post(server, path)
    if BEFORE:
        compare_large(work, path, verdicts)
    p99 = statistics.quantiles(waits, n=100)[98] * 1000 if len(waits) > 2 else float("nan")
    table(f"Upload of {BIG >> 20} MiB, s", ["gracefarm", "pypiserver"], [[f"{mine:.2f}", f"{theirs:.2f}"]])
    verdicts.add(f"upload of {BIG >> 20} MiB, time / pypiserver's time", mine / theirs, 0.4, most=True)
    verdicts.add("memory growth during this upload", growth / (1 << 20), 32, most=True, unit=" MiB")
    verdicts.add(f"p99 of another client's page at that time ({len(waits)} pages)", p99, 50, most=True, unit=" ms")


def compare_large(work: Path, path: Path, verdicts: Verdicts) -> None:
    """Measure large uploads and downloads alternately with the other checkout, since their speed varies over time."""
    assert BEFORE
    uploads, downloads = [], []
    for number in range(3):
        with (
            ours(work / f"big-now{number}") as now,
            ours(work / f"big-before{number}", checkout=BEFORE) as before,
        ):
            uploads.append(post(now, path) / post(before, path))
            downloads += [fetch(now, path, 4) / fetch(before, path, 4) for _ in range(3)]
        for name in ("now", "before"):
            remove_tree(work / f"big-{name}{number}")
    size = path.stat().st_size >> 20
    verdicts.add(f"upload of {size} MiB, time / the other checkout's time", statistics.median(uploads), 1.1, most=True)
    verdicts.add(f"download of {size} MiB, 4 streams, rate / the other checkout's rate", statistics.median(downloads), 0.9)


def fetch(server: Running, path: Path, streams: int) -> float:
    """Bytes per second of downloads of the large file with curl."""
    page = server.url + "/simple/big-cuda/"
    url = page + httpx.get(page, headers={"Accept": JSON}).json()["files"][0]["url"]
    begin = time.monotonic()
    children = [subprocess.Popen(["curl", "-sS", "--fail", "-o", os.devnull, url]) for _ in range(streams)]
    if sum(child.wait() for child in children):  # `sum` waits for every child
        raise SystemExit(f"the download of {url} failed")
    return streams * path.stat().st_size / (time.monotonic() - begin)


def download(server: Running, work: Path, path: Path, verdicts: Verdicts) -> None:
    """Download the same file from the index and from nginx, with one stream and with four streams."""
    tree = work / "tree-big"
    index(work / "root-big", "export", tree)
    size = path.stat().st_size
    with nginx(tree, work) as other:
        rows = []
        for streams in (1, 4):
            pairs = [(fetch(server, path, streams), fetch(other, path, streams)) for _ in range(DOWNLOADS)]
            mine, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            rows.append([str(streams), f"{mine / 1e6:.0f}", f"{theirs / 1e6:.0f}"])
            ratio = statistics.median(ours / other for ours, other in pairs)
            verdicts.add(f"download of {size >> 20} MiB, {streams} streams, rate / nginx's rate", ratio, 0.9)
    table(f"Download of {size >> 20} MiB, MB/s, median of {DOWNLOADS} pairs", ["streams", "gracefarm", "nginx"], rows)


def small_uploads(work: Path, verdicts: Verdicts) -> None:
    """Measure sequential small uploads at MANY stored wheels, and then a start after kill -9 with all uploads in the WAL.

    Our index gets more uploads than the burst that the default `--writes-per-second` allows. So its rate includes this limit.
    """
    rates = {}
    wheels = [wheel(f"new_{number // 10:04}", f"1.{number % 10}") for number in range(UPLOADS)]
    folder, root = work / f"wheels{MANY}", work / f"root{MANY}"
    servers: tuple[tuple[Make, int], ...] = ((partial(ours, root), UPLOADS), (partial(pypiserver, folder), 30))
    for make, count in servers:
        with make() as server, httpx.Client(base_url=server.url, timeout=60, auth=("__token__", server.token)) as client:
            path = "/legacy/" if server.name in OURS else "/"
            begin = time.monotonic()
            for name, content in wheels[:count]:
                digest = hashlib.sha256(content).hexdigest()
                form = {":action": "file_upload", "sha256_digest": digest}
                client.post(path, data=form, files={"content": (name, content)}).raise_for_status()
            rates[server.name] = count / (time.monotonic() - begin)
            if server.name == "gracefarm":
                os.kill(server.pid, signal.SIGKILL)
    wal = (root / "catalogue" / "catalogue.db-wal").stat().st_size
    with ours(root, token="x") as server:
        what = f"start at {MANY + UPLOADS} wheels after kill -9, with a WAL of {wal / (1 << 20):.1f} MiB"
        verdicts.add(what, server.started_s, 1.0, most=True, unit=" s")
    table(
        f"Small uploads at {MANY} stored wheels, per second",
        ["gracefarm", "pypiserver"],
        [[f"{rates['gracefarm']:.0f}", f"{rates['pypiserver']:.1f}"]],
    )
    verdicts.add(f"small uploads at {MANY} stored wheels, rate / pypiserver's", rates["gracefarm"] / rates["pypiserver"], 15)


def resolving(work: Path, verdicts: Verdicts) -> None:
    """Measure the bytes that pip and uv download to choose one of ten large variants of a release."""
    folder = work / "variants"
    folder.mkdir()
    payload = os.urandom(VARIANT)
    for minor in range(10):
        for name, content in (
            wheel("flash_x", f"2.8.3+torch2.{minor}", payload=payload, requires=f"torch==2.{minor}.*"),
            wheel("torch", f"2.{minor}.0"),
        ):
            (folder / name).write_bytes(content)
    index(work / "root-variants", "import", folder)
    remove_tree(folder)
    rows = []
    with ours(work / "root-variants") as server:
        wanted = ["flash_x==2.8.3", "torch==2.0.*"]
        clients: dict[str, list[object]] = {
            "pip": [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--ignore-installed", "--no-cache-dir",
                    "--disable-pip-version-check", "--index-url", server.url + "/simple/", *wanted],
            "uv": [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--no-config", "--no-cache", "--target", work,
                   "--default-index", server.url + "/simple/", *wanted],
        }  # fmt: skip
        assert server.log
        for name, command in clients.items():
            os.truncate(server.log, 0)
            begin = time.monotonic()
            run(*command)
            seconds = time.monotonic() - begin
            time.sleep(0.3)
            sizes = [int(line.split('" ')[1].split()[1]) for line in server.log.read_text().splitlines()]
            rows.append([name, str(len(sizes)), f"{sum(sizes) / 1000:.1f}", f"{seconds:.2f}"])
            what = f"choosing one of ten {VARIANT >> 20} MiB variants, {name}"
            verdicts.add(what, sum(sizes) / 1000, 50, most=True, unit=" kB")
    table(f"Choosing one of ten {VARIANT >> 20} MiB variants", ["client", "requests", "kB received", "s"], rows)


def machine() -> str:
    """The facts that affect the ratios: the processor, and the versions of the servers."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("granian", "uvloop", "starlette", "pypiserver"))
    web = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr.strip().rpartition(": ")[2]
    cores = f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else os.uname().machine}"
    return f"{cores}; load {os.getloadavg()[0]:.1f}; Python {sys.version.split()[0]}, {versions}, {web}"


def main() -> None:
    """Run all measurements of the index."""
    missing = [name for name in ("wrk", "nginx", "curl", "openssl") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"the benchmark needs {', '.join(missing)}: builder/data/system-packages-test.txt")
    work = settings.load().home / "bench-index"
    remove_tree(work)
    work.mkdir(parents=True)
    measurements: tuple[Callable[[Path, Verdicts], None], ...] = (pages, small_uploads, large_upload, resolving)
    verdicts, begin = Verdicts(), time.monotonic()
    with ExitStack() as stack:
        stack.callback(remove_tree, work)
        for measure in measurements:
            measure(work, verdicts)
    table("Figures and targets", ["what", "figure", "target", "verdict"], verdicts.rows)
    print(f"\n{machine()}; {time.monotonic() - begin:.0f} s in total, on {time.strftime('%Y-%m-%d', time.gmtime())}.")


if __name__ == "__main__":
    main()
