"""The web pages in real Chromium: content, accessibility (axe), keyboard, narrow screens, no JavaScript."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser_kit import check_page, chromium
from index_kit import Server, run_index, wheel
from playwright.sync_api import Browser

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed: see system-packages-test.txt"
)

LONG = "causal_conv1d"
FILENAME = "causal_conv1d-1.7.0+cu130-cp311-cp311-manylinux_2_34_aarch64.whl"


@pytest.fixture(scope="module")
def site(shared: Server) -> Server:
    """Wheels with records, a failed build, a set, a yank."""
    for cuda in ("12.4", "13.0"):
        for python in ("cp311", "cp312"):
            put_built(shared, cuda, python)
    put_failed(shared)
    run_index(shared.root, "stage", "create", "gh200")
    run_index(shared.root, "stage", "add", "gh200", FILENAME)
    run_index(shared.root, "stage", "publish", "gh200")
    run_index(shared.root, "yank", LONG, "1.7.0+cu124", "--reason", "wrong results")
    return shared


def put_built(server: Server, cuda: str, python: str) -> None:
    """A wheel with the record and the log of its build."""
    tag = "cu" + cuda.replace(".", "")
    build = hashlib.sha256((cuda + python).encode()).hexdigest()
    inputs = {
        "recipe": {
            "name": "causal-conv1d",
            "source": {"kind": "git", "commit": "6a3f8d0c2b1e4f5a9c7d8e0f1a2b3c4d5e6f7a8b"},
        },
        "stack": {"cuda": cuda, "torch": "2.11.0", "sm": ["90"]},
        "target": "aarch64",
    }
    inside = json.dumps({"build_id": build, "inputs": inputs}).encode()
    name, content = wheel(
        LONG,
        f"1.7.0+{tag}",
        f"{python}-{python}-manylinux_2_34_aarch64",
        files={f"{LONG}/__init__.py": b"", f"{LONG}-1.7.0+{tag}.dist-info/gracefarm.json": inside},
    )
    assert server.upload(name, content).status_code == 200
    record = {
        "build_id": build,
        "recipe": "causal-conv1d",
        "version": "1.7.0",
        "stack": tag,
        "inputs": inputs,
        "outcome": "built",
        "wheel": {"filename": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)},
        "stages": [{"name": "compile", "wall_s": 1432.5, "peak_memory": 7 << 30}],
        "verdicts": [
            {"gate": "cubins", "status": "passed", "summary": "exactly sm_90", "details": ["causal.so: sm_90"]},
            {"gate": "symbols", "status": "passed", "summary": "1832 symbols, each found", "details": []},
        ],
        "finished": "2026-11-23T10:00:00+00:00",
    }
    put_record(server, build, record, b"log\n")


def put_failed(server: Server) -> None:
    """The record and the log of a build that failed."""
    failed = {
        "build_id": "failed-1",
        "recipe": "vllm",
        "stack": "cu130",
        "outcome": "failed",
        "failure": {
            "kind": "compile",
            "exit_code": 21,
            "cause": "gemm.cu(12): error: <evil> is undefined",
            "remedy": "see the log",
        },
        "stages": [{"name": "compile", "wall_s": 5400}],
    }
    log = "".join(f"line {number} of the log\n" for number in range(100))
    put_record(server, "failed-1", failed, log.encode())


def put_record(server: Server, build: str, record: dict[str, object], log: bytes) -> None:
    auth = ("__token__", server.token)
    assert server.client.put(f"/records/{build}", json=record, auth=auth).status_code == 200
    assert server.client.put(f"/records/{build}/log", content=log, auth=auth).status_code == 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


PAGES = {
    "projects": "/",
    "nothing found": "/?q=zzz",
    "project": "/project/causal-conv1d/",
    "finder": "/project/causal-conv1d/?cuda=13.0&python=3.11",
    "finder without result": "/project/causal-conv1d/?cuda=9.9",
    "wheel": f"/wheel/{FILENAME.replace('+', '%2B')}/",
    "board": "/board/",
    "build": "/board/failed-1/",
    "sets": "/sets/",
}


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES.keys())
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_sticks_out(site: Server, browser: Browser, path: str, scheme: str, width: int) -> None:
    check_page(browser, site.url + path, scheme=scheme, width=width)


def test_the_finder_works_without_javascript_and_by_keyboard(site: Server, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(site.url + "/project/causal-conv1d/")
    page.get_by_label("CUDA").focus()
    page.keyboard.type("13")
    page.get_by_label("Python").focus()
    page.keyboard.type("3.12")
    page.get_by_role("button", name="Show").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**cuda=13.0**")
    text = page.inner_text("main")
    assert f"pip install --index-url {site.url}/cu130/simple/ 'causal-conv1d==1.7.0+cu130'" in text
    assert f"uv pip install --index {site.url}/cu130/simple/ 'causal-conv1d==1.7.0+cu130'" in text
    assert 'explicit = true\n\n[tool.uv.sources]\ncausal-conv1d = { index = "gracefarm-cu130" }' in text
    assert "1 of 4" in text
    context.close()


def test_what_is_not_here_is_told_as_a_page(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    answer = page.goto(site.url + "/project/no-such/")
    assert answer is not None
    assert answer.status == 404
    assert Axe().run(page).violations_count == 0
    page.get_by_role("link", name="See all projects").click()
    assert page.url == site.url + "/"
    page.close()


def test_the_first_key_skips_to_the_content(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(site.url + "/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.close()


def test_every_link_of_every_page_leads_somewhere(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    addresses: set[str] = set()
    for path in PAGES.values():
        page.goto(site.url + path)
        addresses |= set(
            page.eval_on_selector_all("a[href], link[href]", "links => links.map(link => link.href.split('#')[0])")
        )
    page.close()
    assert len(addresses) > 15
    for link in sorted(addresses):
        assert link.startswith(site.url), "pages load nothing from other hosts"
        assert site.client.get(link).status_code == 200, link


def test_what_the_pages_say(site: Server) -> None:
    text = site.client.get(PAGES["wheel"]).text
    for word in (
        "13.0",
        "2.11.0",
        "exactly sm_90",
        "1832 symbols",
        "6a3f8d0c2b1e4f5a9c7d8e0f1a2b3c4d5e6f7a8b",
        "gh200",
        "sha256",
        "/log",
    ):
        assert word in text, word
    board = site.client.get("/board/").text
    assert "error: &lt;evil&gt; is undefined" in board
    assert "<evil>" not in board
    failed = site.client.get("/board/failed-1/").text
    assert "see the log" in failed, "the remedy"
    assert "line 99 of the log" in failed
    assert "line 1 of the log" not in failed, "only its end"
    assert "24 min" in board
    assert "90 min" in board
    project = site.client.get("/project/causal-conv1d/").text
    assert "wrong results" in project
    assert "1.7.0+cu130" in project.partition("pip install")[2].partition("</code>")[0], "the yanked one is not recommended"
    assert site.client.get("/project/Causal_Conv1d/").headers["location"].endswith("causal-conv1d/")


def test_staged_wheels_are_on_no_page(site: Server) -> None:
    run_index(site.root, "stage", "create", "hidden-set")
    assert site.upload(*wheel("hidden_pkg"), path="/stage/hidden-set/legacy/").status_code == 200
    assert "hidden" not in site.client.get("/").text + site.client.get("/sets/").text
    assert site.client.get("/project/hidden-pkg/").status_code == 404
    assert site.client.get("/wheel/hidden_pkg-1.0-py3-none-any.whl/").status_code == 404


def test_pages_forbid_what_they_do_not_use(site: Server) -> None:
    headers = site.client.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_pip_is_told_to_trust_plain_http_from_elsewhere(site: Server) -> None:
    """pip ignores plain http without the option, except on loopback."""
    for path in (PAGES["project"], PAGES["wheel"], PAGES["sets"]):
        text = site.client.get(path, headers={"Host": "wheels.example:8080"}).text
        assert "pip install --trusted-host wheels.example --index-url http://wheels.example:8080/" in text
        assert "--trusted-host" not in site.client.get(path).text


def test_what_is_asked_for_in_vain_is_said(site: Server) -> None:
    text = site.client.get("/project/causal-conv1d/?cuda=9.9&python=cp311").text
    assert "No wheel matches CUDA 9.9 and Python 3.11." in text
    assert "<option selected>9.9</option>" in text, "the form shows the choice"


def test_a_quarantined_project_has_no_finder(site: Server) -> None:
    assert site.upload(*wheel("kept_away")).status_code == 200
    run_index(site.root, "status", "kept-away", "quarantined", "--reason", "it mines")
    text = site.client.get("/project/kept-away/").text
    assert "The project is quarantined, so its files are not available" in text
    assert "<select" not in text


def test_a_forged_host_is_not_printed(site: Server) -> None:
    assert site.client.get("/sets/", headers={"Host": "[:"}).status_code == 200
    assert "evil" not in site.client.get("/", headers={"Host": 'evil"><script>'}).text
