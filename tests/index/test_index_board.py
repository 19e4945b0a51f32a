"""The board of cells and the certificates on pages, and lines of any length on every page."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from browser_kit import check_page, chromium
from index_kit import REPOSITORY, Server, run_index, wheel
from playwright.sync_api import Browser

from index.store.records import Summary
from index.store.schemas import MatrixDocument
from index.web.board import MAX_SHOWN, matrix_board

in_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed: see system-packages-test.txt"
)

WHEEL = "board_pkg-1.0+cu130-cp313-cp313-manylinux_2_34_aarch64.whl"
ERROR = 'gemm.cu(12): error: identifier "<evil>" is undefined'
BLOCKER = "torch 2.15.0 has no wheel for cp314t"
LONG = "W" * 1500
DIGEST = hashlib.sha256(b"device code of board").hexdigest()


def cell(python: str, state: str = "built", **changes: object) -> dict[str, object]:
    plain: dict[str, object] = {"recipe": "board_pkg", "version": "1.0", "stack": "cu130", "target": "aarch64", "sm": ["90a"]}
    return {**plain, "python": python, "state": state, **changes}


def document(*cells: dict[str, object], name: str = "default", **changes: object) -> dict[str, object]:
    whole = {"name": name, "selector": "python=3.11..3.14t", "made": "2026-11-29T01:00:00+00:00", "cells": cells}
    return {**whole, **changes}


def put(server: Server, path: str, content: object) -> None:
    answer = server.client.put(path, json=content, auth=("__token__", server.token))
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def site(shared: Server) -> Server:
    """A matrix with cells of every state, records of some cells, and the record of a build outside of the matrix."""
    content = wheel("board_pkg", "1.0+cu130", "cp313-cp313-manylinux_2_34_aarch64")[1]
    assert shared.upload(WHEEL, content).status_code == 200
    record = {
        "build_id": "board-built",
        "recipe": "board-pkg",
        "version": "1.0",
        "stack": "cu130",
        "outcome": "built",
        "wheel": {"filename": WHEEL, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)},
        "device_digests": {"90a": DIGEST},
        "finished": "2026-11-28T10:00:00+00:00",
    }
    failed = {**record, "build_id": "board-failed", "outcome": "failed", "failure": {"kind": "compile", "cause": ERROR}}
    failed = {key: value for key, value in failed.items() if key not in ("wheel", "device_digests")}
    put(shared, "/records/board-built", record)
    put(shared, "/records/board-failed", failed)
    put(shared, "/records/elsewhere-1", {"recipe": "elsewhere", "stack": "cu130", "outcome": "built", "version": "3.1"})
    cells = (
        cell("3.10", "served", build_id="board-built", wheel=WHEEL, reason=f"by {WHEEL}", cpu_seconds=3600),
        cell("3.11", build_id="board-built"),
        cell("3.12", "not tried", build_id="board-failed"),
        cell("3.13", wheel=WHEEL),
        cell("3.13t", "failed", reason=ERROR),
        cell("3.14", "not tried", cpu_seconds=7200, disk_bytes=3 << 30),
        cell("3.14t", "blocked", reason=BLOCKER),
        cell("3.14t", "blocked", recipe="other_pkg", reason=BLOCKER),
        cell("3.14", "blocked", recipe="other_pkg", target="x86_64", sm=["90", "100f"], reason="the licence forbids it"),
    )
    put(shared, "/matrix/default", document(*cells))
    return shared


@in_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_axe_finds_nothing_on_the_board(site: Server, browser: Browser, scheme: str, width: int) -> None:
    check_page(browser, site.url + "/board/", scheme=scheme, width=width)


@in_chromium
def test_the_board_shows_each_state_and_leads_to_builds_and_wheels(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(site.url + "/board/")
    chips = page.locator("table.board").first.locator(".chip")
    assert [" ".join(text.split()[1:]) for text in chips.all_inner_texts()] == [
        *("3.10 served", "3.11 built", "3.12 failed", "3.13 built", "3.13t failed", "3.14 not tried", "3.14t blocked"),
        *("3.14t blocked", "3.14 blocked"),
    ]
    assert page.locator(".legend").inner_text().split("\n") == [
        *("✓ 2 built", "↺ 1 served"),
        *("✗ 2 failed", "⊘ 3 blocked", "○ 1 not tried"),
    ]
    links = chips.evaluate_all("chips => chips.map(chip => chip.href || '')")
    assert links == [
        f"{site.url}/board/board-built/",
        f"{site.url}/board/board-built/",
        f"{site.url}/board/board-failed/",
        f"{site.url}/wheel/{WHEEL.replace('+', '%2B')}/",
        *[""] * 5,
    ]
    for link in filter(None, links):
        assert site.client.get(link).status_code == 200, link
    page.close()


def test_the_board_says_why(site: Server) -> None:
    text = site.client.get("/board/").text
    assert "<evil>" not in text
    failed = text.partition('id="failed-default"')[2].partition('id="blocked-default"')[0]
    assert failed.count("identifier &#34;&lt;evil&gt;&#34; is undefined") == 1, "one error for all its cells"
    assert "2 cells</summary>" in failed
    blocked = text.partition('id="blocked-default"')[2].partition("</section>")[0]
    assert blocked.index(BLOCKER) < blocked.index("the licence forbids it"), "the most frequent cause comes first"
    assert "board_pkg 1.0" in blocked
    assert "other_pkg 1.0" in blocked
    assert "The remaining cells need about 2 h 00 min of CPU time and 3.00 GiB of disk space." in text
    others = text.partition("Other builds")[2]
    assert "elsewhere" in others
    assert "board-built" not in others, "it is in the matrix"


def test_the_board_shows_the_cells_that_the_builder_prints(site: Server) -> None:
    """The real `builder matrix`, which only plans."""
    command = [sys.executable, "-m", "builder", "matrix", "causal_conv1d", "--json", "--matrix"]
    command += ["python=root,3.11,3.13,3.13-trixie"]
    command += ["--publish", f"{site.url}/legacy/", "--as", "builder"]
    environment = {**os.environ, "TWINE_USERNAME": "__token__", "TWINE_PASSWORD": site.token}
    process = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True, env=environment)
    printed = json.loads(process.stdout.splitlines()[-1])
    assert printed["name"] == "builder"
    refused = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, check=False, env={**environment, "TWINE_PASSWORD": "wrong"}
    )
    assert refused.returncode == 40
    assert "the matrix was not published" in refused.stderr + refused.stdout
    text = site.client.get("/board/").text.partition('id="matrix-builder"')[2].partition("</section>")[0]
    assert printed["cells"]
    for wanted in printed["cells"]:
        assert f"{wanted['stack']} {wanted['target']}" in text
        assert wanted["recipe"] in text
    assert [wanted["python"] for wanted in printed["cells"]] == ["3.11", "3.11", "3.13", "3.13"]
    chips = re.findall(r"</span> (\S+)<span class=\"hidden\"> ([a-z ]+)</span>", text.partition("</table>")[0])
    assert sorted(chips) == sorted((wanted["interpreter"], wanted["state"]) for wanted in printed["cells"])
    assert {name for name, _ in chips} == {"root", "3.11", "3.13", "3.13-trixie"}


def shown(state: str, outcome: str, finished: str) -> str:
    matrix = MatrixDocument.model_validate(document(cell("3.11", state, build_id="a", reason="as listed")))
    record = Summary(
        id="a", recipe="", version="", stack="", target="", outcome=outcome, seconds=None, cause="as recorded",
        finished=finished, document=None, log=None,
    )  # fmt: skip
    board = matrix_board(matrix, {"a": record}, set())
    (place,) = board.rows[0].places.values()
    (listed,) = next(iter(place.values()))
    return f"{listed.state}: {listed.reason}"


@pytest.mark.parametrize(
    ("state", "outcome", "finished", "expected"),
    [
        ("not tried", "built", "2026-11-28T00:00:00+00:00", "built: as recorded"),
        ("blocked", "failed", "2026-11-28T00:00:00+00:00", "failed: as recorded"),
        ("failed", "built", "2026-11-30T00:00:00+00:00", "built: as recorded"),
        ("failed", "built", "2026-11-28T00:00:00+00:00", "failed: as listed"),
        ("built", "failed", "2026-11-28T00:00:00Z", "built: as listed"),
        ("built", "failed", "2026-11-29T01:00:01Z", "failed: as recorded"),
        ("built", "failed", "yesterday", "built: as listed"),
        ("built", "failed", "2026-11-30T00:00:00", "built: as listed"),
        ("built", "odd", "2026-11-30T00:00:00Z", "built: as listed"),
        ("running", "failed", "2026-11-28T00:00:00Z", "running: as listed"),
        ("running", "built", "2026-11-30T00:00:00Z", "built: as recorded"),
    ],
)
def test_the_later_word_counts(state: str, outcome: str, finished: str, expected: str) -> None:
    assert shown(state, outcome, finished) == expected


def test_a_running_cell_has_a_mark(site: Server) -> None:
    put(site, "/matrix/busy", document(cell("3.13", "running"), name="busy"))
    part = site.client.get("/board/").text.partition('id="matrix-busy"')[2].partition("</section>")[0]
    assert '<span aria-hidden="true">…</span> 1 running' in part
    put(site, "/matrix/busy", document(name="busy"))


def test_more_cells_than_can_be_drawn_are_counted(site: Server) -> None:
    cells = [cell("3.11", "not tried", stack=f"stack-{number}") for number in range(MAX_SHOWN)]
    put(site, "/matrix/large", document(*cells, cell("3.12", "failed", reason="the only error"), name="large"))
    text = site.client.get("/board/").text.partition('id="matrix-large"')[2]
    assert f"{MAX_SHOWN} not tried" in text
    assert "This matrix has too many cells to draw." in text
    assert "the only error" in text
    put(site, "/matrix/large", document(name="large"))
    assert "No cells." in site.client.get("/board/").text.partition('id="matrix-large"')[2]


def test_builds_of_staged_wheels_are_not_linked(site: Server) -> None:
    run_index(site.root, "stage", "create", "board-set")
    name, content = wheel("board_pkg", "2.0+cu130", "cp313-cp313-manylinux_2_34_aarch64")
    assert site.upload(name, content, path="/stage/board-set/legacy/").status_code == 200
    digest = hashlib.sha256(content).hexdigest()
    put(site, "/records/board-hidden", {"build_id": "board-hidden", "recipe": "board-pkg", "wheel": {"sha256": digest}})
    put(site, "/matrix/hidden", document(cell("3.13", build_id="board-hidden", wheel=name), name="hidden"))
    part = site.client.get("/board/").text.partition('id="matrix-hidden"')[2].partition("</section>")[0]
    assert "✓" in part
    assert "<a class=" not in part


def certificate(wheel_sha256: str, **changes: object) -> dict[str, object]:
    return {
        "device_digest": DIGEST,
        "sm": "90a",
        "gpu": "NVIDIA H100 80GB HBM3",
        "certified": datetime(2026, 11, 28, tzinfo=UTC).isoformat(),
        "wheel": {"filename": "board_pkg-1.0+cu130-cp311-cp311-manylinux_2_34_x86_64.whl", "sha256": wheel_sha256},
        "comparisons": [{"name": "forward", "error": 0.0004, "tolerance": 0.001}],
        **changes,
    }


def test_a_wheel_shows_its_certificates_and_those_of_its_twin(site: Server) -> None:
    page = f"/wheel/{WHEEL.replace('+', '%2B')}/"
    assert "Certificates" not in site.client.get(page).text
    put(site, f"/certificates/{DIGEST}", certificate("ab" * 32))
    text = site.client.get(page).text
    assert "a wheel with the same device code ran" in text
    assert "board_pkg-1.0+cu130-cp311-cp311-manylinux_2_34_x86_64.whl" in text
    assert "forward: largest error 0.0004, tolerance 0.001" in text
    own = site.page("board-pkg").json()["files"][0]["hashes"]["sha256"]
    put(site, f"/certificates/{DIGEST}", certificate(own))
    assert "this wheel ran" in site.client.get(page).text
    doubt = "it is not known whether the comparisons ran code for sm 90a"
    assert doubt not in site.client.get(page).text
    put(site, f"/certificates/{DIGEST}", certificate(own, other_sm=["90"]))
    assert f"This GPU can also run the code for sm 90 in that wheel, so {doubt}." in site.client.get(page).text
    link = re.search(r'href="\.\./\.\./(certificates/[0-9a-f]+)"', site.client.get(page).text)
    assert link
    assert site.client.get("/" + link[1]).json()["sm"] == "90a"


@pytest.fixture(scope="module")
def long_lines(site: Server) -> list[str]:
    """Insert long texts without spaces everywhere; return the addresses of the pages that show them."""
    lines = (
        *("Metadata-Version: 2.1", "Name: long_pkg", f"Version: 1.0+{'a' * 60}", f"Summary: {LONG[:512]}", f"Author: {LONG}"),
        *(f"License: {LONG[:200]}", f"Requires-Dist: {LONG}; extra == '{LONG[:300]}'", f"Provides-Extra: {LONG[:300]}"),
        *(f"Project-URL: {LONG[:32]}, https://example.org/{LONG}", "Description-Content-Type: text/markdown"),
    )
    table = f"| {LONG} | b |\n|---|---|\n| {LONG} | {LONG} |"
    readme = "\n\n".join((f"# {LONG}", LONG, f"`{LONG}`", f"    {LONG}", table, f"- {LONG}", f"> {LONG}"))
    name, content = wheel(
        "long_pkg", f"1.0+{'a' * 60}", f"cp311-cp311-{'.'.join(f'manylinux_2_{number}_aarch64' for number in range(17, 22))}",
        meta=("\n".join(lines) + "\n\n" + readme).encode(),
    )  # fmt: skip
    assert site.upload(name, content).status_code == 200, site.upload(name, content).text
    digest = hashlib.sha256(content).hexdigest()
    record = {
        "build_id": "l" * 128,
        "name": "long-pkg",
        "recipe": LONG,
        "version": LONG,
        "stack": LONG,
        "inputs": {"target": LONG, "recipe": {"source": {"url": LONG, LONG: LONG}}, "stack": {"sm": list(range(100, 164))}},
        "outcome": "failed",
        "failure": {"cause": LONG, "remedy": LONG},
        "stages": [{"name": LONG, "wall_s": 1e14, "peak_memory": 1e14, "note": LONG}],
        "verdicts": [{"gate": LONG, "status": LONG, "summary": LONG, "details": [LONG]}],
        "wheel": {"sha256": digest},
        "device_digests": {"90": "c" * 64},
    }
    put(site, f"/records/{'l' * 128}", record)
    answer = site.client.put(f"/records/{'l' * 128}/log", content=LONG * 10, auth=("__token__", site.token))
    assert answer.status_code == 200
    wide = "w" * 128
    cells = [
        cell(
            "3.11", "failed", recipe=wide, stack=f"{number}{wide[1:]}", version=LONG[:200], reason=LONG * 99, sm=["100f"] * 64
        )
        for number in range(3)
    ]
    put(site, "/matrix/long", document(*cells, name="long", selector=LONG))
    ran = {"filename": f"long_pkg-1.0+{'a' * 60}-py3-none-any.whl", "sha256": "ef" * 32}
    compared = [{"name": LONG[:200], "error": 1e14, "tolerance": 1e-300}]
    facts = {"gpu": LONG[:200], "driver": LONG[:200], "wheel": ran, "comparisons": compared}
    put(site, f"/certificates/{'c' * 64}", certificate("", device_digest="c" * 64, **facts))
    run_index(site.root, "yank", "long-pkg", f"1.0+{'a' * 60}", "--reason", LONG)
    run_index(site.root, "status", "long-pkg", "deprecated", "--reason", LONG)
    set_name = "s" * 64
    run_index(site.root, "stage", "create", set_name)
    run_index(site.root, "stage", "add", set_name, name)
    run_index(site.root, "stage", "publish", set_name)
    return ["/", f"/?q={LONG[:100]}", "/project/long-pkg/", f"/project/long-pkg/?cuda={LONG}&python={LONG}", f"/wheel/{name}/",
            "/board/", f"/board/{'l' * 128}/", "/sets/", f"/project/{LONG[:200]}/"]  # fmt: skip


@in_chromium
@pytest.mark.parametrize("width", [320, 1200])
def test_no_line_makes_a_page_scroll_sideways(site: Server, browser: Browser, long_lines: list[str], width: int) -> None:
    for path in long_lines[:-1]:
        check_page(browser, site.url + path.replace("+", "%2B"), width=width, axe=False)


@in_chromium
def test_no_line_makes_the_page_of_what_is_not_here_scroll(site: Server, browser: Browser, long_lines: list[str]) -> None:
    page = browser.new_page(viewport={"width": 320, "height": 800})
    page.goto(site.url + long_lines[-1])
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.close()
