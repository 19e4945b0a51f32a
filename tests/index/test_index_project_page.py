"""The page of a project with 150 wheels: releases, ABI, description, dependencies, copying; the search; hostile text."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest
from browser_kit import SECOND_HOST, check_page, chromium
from index_kit import Server, run_index, sdist, serving, wheel
from playwright.sync_api import Browser

from index.simple_api.views import Listed
from index.store.facts import CudaFacts
from index.web.about import about, render
from index.web.finder import WheelChoice, asked_python, choice_of, options
from index.web.projects import ProjectRow, search

in_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed: see system-packages-test.txt"
)

README = """# Causal depthwise conv1d

<p align="center"><img src="https://elsewhere.example/logo.png" alt="The logo"></p>

[![build](https://elsewhere.example/badge.svg)](https://ci.example/run) [![](https://elsewhere.example/b.svg)](https://ci.example/b)

```python
out = causal_conv1d_fn(x, weight, bias=None, activation=None)  # a comment that goes on and on beyond any narrow screen
```

| GPU | time |
|---|---|
| H100 | 1.2 ms |

#### Deep heading

[upstream](https://upstream.example/) [near](docs/near.md) [bad](javascript:window.evil=1)
<script>window.evil = 1</script><a href="https://x.example" onclick="window.evil=1">click</a>
<img src=x onerror="window.evil=1"><style>body { display: none }</style>
"""
PYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp313t", "cp314", "cp314t", "cp315")


def metadata(name: str, version: str, summary: str, *lines: str, text: str = README, kind: str = "text/markdown") -> bytes:
    head = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", f"Summary: {summary}", *lines]
    return ("\n".join([*head, f"Description-Content-Type: {kind}"]) + "\n\n" + text).encode()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An index with an imported folder: 144 wheels of one project, its sdist, and a few others."""
    folder = tmp_path_factory.mktemp("wheels")
    root = tmp_path_factory.mktemp("site") / "root"
    names = ("causal-conv1d", "flash-attn", "xformers", "einops", "natten", "only-source")
    for name, content in everything():
        (folder / name).write_bytes(content)
    root.mkdir()
    run_index(root, "host", *names)
    run_index(root, "import", "--variants", str(folder))
    run_index(root, "yank", "causal-conv1d", "1.6.1+cu130.torch2.12", "--reason", "wrong numbers on sm_103")
    with serving(root, "--allow-new") as running:
        yield running


def everything() -> Iterator[tuple[str, bytes]]:
    lines = (
        *("Requires-Python: >=3.9", "License-Expression: BSD-3-Clause", "Author: Tri Dao", "Provides-Extra: dev"),
        *("Requires-Dist: torch==2.11.*", 'Requires-Dist: einops>=0.8; extra == "dev"'),
        "Project-URL: Source, https://github.example/causal-conv1d",
    )
    for version in ("1.7.0", "1.6.2", "1.6.1"):
        for local in ("cu130.torch2.11", "cu130.torch2.12", "cu128.torch2.11"):
            full = f"{version}+{local}"
            meta = metadata("causal_conv1d", full, "Causal depthwise conv1d in CUDA", *lines)
            facts = {"cuda": local[2:4] + "." + local[4], "torch": local[-4:], "sm": ["80", "90a", "100f", "120"]}
            for python in PYTHONS:
                for arch in ("aarch64", "x86_64"):
                    build = hashlib.sha256(f"{full}{python}{arch}".encode()).hexdigest()
                    inside = json.dumps({"build_id": build, "recipe": "causal-conv1d", "facts": facts}).encode()
                    files = {"causal_conv1d/__init__.py": b"", f"causal_conv1d-{full}.dist-info/gracefarm.json": inside}
                    tags = f"{python.rstrip('t')}-{python}-manylinux_2_34_{arch}"
                    yield wheel("causal_conv1d", full, tags, files=files, meta=meta)
    yield sdist("causal_conv1d", "1.6.2")
    yield wheel("flash_attn", "2.8.3", meta=metadata("flash_attn", "2.8.3", "Fast and memory-efficient exact attention"))
    blocks = metadata("xformers", "0.0.33", "Building blocks for Transformers", "Requires-Python: >=3.10")
    yield wheel("xformers", "0.0.33", "cp39-abi3-manylinux_2_34_aarch64", meta=blocks)
    variant = {
        "$schema": "https://variants-schema.wheelnext.dev/peps/850/v0.2.0.json",
        "default-priorities": {"namespace": ["nvidia"]},
        "providers": {"nvidia": {"plugin-api": "nvidia_variant_provider.plugin:NvidiaVariantPlugin", "requires": ["a"]}},
        "variants": {"cu130_sm90": {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": ["90_real"]}}},
    }
    files = {"natten/__init__.py": b"", "natten-1.0.dist-info/variant.json": json.dumps(variant).encode()}
    plain = "cp311-cp311-manylinux_2_34_aarch64"
    yield wheel("natten", "1.0", f"{plain}-cu130_sm90", files=files, wheel_tags=plain)
    yield sdist("only_source", "3.0")
    yield wheel("einops", "0.8.1", meta=metadata("einops", "0.8.1", "A new flavour of deep learning operations"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@in_chromium
def test_axe_finds_nothing_on_a_page_with_everything(site: Server, browser: Browser) -> None:
    address = f"{site.url}/project/causal-conv1d/"
    check_page(browser, address, scheme="dark", width=390)
    check_page(browser, address, axe=False)


@in_chromium
def test_releases_are_newest_first_and_older_ones_are_folded_without_javascript(site: Server, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site.url}/project/causal-conv1d/")
    titles = page.locator("details.release > summary strong").all_inner_texts()
    assert titles == ["1.7.0", "1.6.2", "1.6.1"]
    assert page.locator("details.release tbody tr").count() == 145
    assert page.locator("details.release[open] tbody tr").count() == 48, "the newest release is open, the others are folded"
    assert not page.get_by_text("wrong numbers on sm_103").first.is_visible()
    assert page.get_by_text("49 files").is_visible(), "the sdist is listed in its release"
    page.locator("details.release > summary").nth(2).click()
    assert page.get_by_text("wrong numbers on sm_103").first.is_visible()
    first = page.locator("details.release").first.inner_text()
    assert first.index("cu130.torch2.12") < first.index("cu130.torch2.11") < first.index("cu128.torch2.11")
    assert page.locator("button").all_inner_texts() == ["Show"], "no button without effect"
    context.close()


@in_chromium
def test_the_abi_is_shown_and_chosen(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{site.url}/project/causal-conv1d/")
    page.get_by_label("Python", exact=True).select_option("3.13t")
    page.get_by_label("CUDA", exact=True).select_option("12.8")
    page.get_by_label("Platform", exact=True).select_option("aarch64")
    page.get_by_role("button", name="Show").click()
    rows = page.locator("details.release tbody tr").all_inner_texts()
    assert len(rows) == 3
    assert all("3.13t" in row and "cp313t" in row for row in rows)
    assert "Commands for 1.7.0+cu128.torch2.11, Python 3.13t, aarch64" in page.inner_text("main")
    page.goto(f"{site.url}/project/causal-conv1d/?python=cp313&cuda=12.8&platform=aarch64")
    assert [row for row in page.locator("details.release tbody tr").all_inner_texts() if "cp313t" in row] == []
    assert page.locator("details.release tbody tr").count() == 3, "an old link shows the same"
    page.close()


def test_an_abi3_wheel_appears_for_every_python_that_it_serves(site: Server) -> None:
    for python, count in (("3.9", 0), ("3.10", 1), ("3.14", 1), ("3.15", 1), ("3.13t", 0)):
        text = site.client.get(f"/project/xformers/?python={python}").text
        assert text.count('data-label="ABI">abi3') == count, python
    assert ">3.9+</td>" in site.client.get("/project/xformers/").text
    assert "<option>3.9</option>" not in site.client.get("/project/xformers/").text, "Requires-Python is respected"


def test_a_project_of_variants_or_sources_alone_has_no_line_that_fails(site: Server) -> None:
    text = site.client.get("/project/natten/").text
    assert "wheel-variants --index" in text
    assert '<span class="tag">cu130_sm90</span>' in text
    assert "choose.py" not in text
    text = site.client.get("/project/only-source/").text
    assert '<span class="sub">3.0</span>' in text
    assert "choose.py" not in text
    assert "Commands for" not in text
    assert "Install</h2>" not in text, "there is no command, and one file leaves nothing to choose"


def chosen(filename: str, requires_python: str | None = None) -> WheelChoice:
    kind = "bdist_wheel" if filename.endswith(".whl") else "sdist"
    return choice_of(
        Listed(
            **dict.fromkeys(("metadata_sha256", "yanked", "build", "url")),
            filename=filename,
            project="a",
            version="1",
            kind=kind,
            sha256="",
            size=1,
            uploaded="",
            requires_python=requires_python,
            facts=CudaFacts(),
        )  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("tags", "python", "some", "none"),
    [
        ("cp313-cp313-linux_x86_64", "3.13", {"3.13"}, {"3.13t", "3.14"}),
        ("cp313-cp313t-linux_x86_64", "3.13t", {"3.13t"}, {"3.13", "3.14t"}),
        ("cp39-abi3-linux_x86_64", "3.9+", {"3.9", "3.15"}, {"3.8", "3.13t"}),
        ("cp315-abi3t-linux_x86_64", "3.15t+", {"3.15t"}, {"3.15", "3.14t"}),
        ("cp310.cp311-cp310.cp311-linux_x86_64", "3.10, 3.11", {"3.10", "3.11"}, {"3.12"}),
        ("py2.py3-none-any", "any", {"3.8", "3.15", "3.14t"}, set()),
        ("py310-none-any", "3.10+", {"3.10", "3.15"}, {"3.9"}),
        ("cp311-none-linux_x86_64", "3.11", {"3.11"}, {"3.12"}),
        ("pp311-pypy311_pp73-linux_x86_64", "PyPy 3.11", set(), {"3.11"}),
    ],
)
def test_pythons_of_tags(tags: str, python: str, some: set[str], none: set[str]) -> None:
    choice = chosen(f"a-1-{tags}.whl")
    assert choice.python == python
    assert some <= set(choice.pythons)
    assert none.isdisjoint(choice.pythons)


def test_requires_python_bounds_what_a_wheel_serves() -> None:
    choice = chosen("a-1-cp39-abi3-linux_x86_64.whl", ">=3.10,<3.13")
    assert choice.pythons == ("3.10", "3.11", "3.12")
    assert options([choice, chosen("a-1-py3-none-any.whl")], "python") == ["3.10", "3.11", "3.12"]
    assert asked_python("cp313t") == "3.13t"


def test_what_the_project_says_of_itself_is_shown(site: Server) -> None:
    text = site.client.get("/project/causal-conv1d/").text
    for part in (
        "BSD-3-Clause",
        "Tri Dao",
        '<a href="https://github.example/causal-conv1d" rel="nofollow noopener noreferrer">Source</a>',
        "<code>torch==2.11.*</code>",
        "For <code>causal-conv1d[dev]</code>",
        "<code>einops&gt;=0.8</code>",
        "<h3>Causal depthwise conv1d</h3>",
        "<h4>Deep heading</h4>",
        '<a href="https://ci.example/run" rel="nofollow noopener noreferrer">build</a>',
        "The logo",
        "<td>1.2 ms</td>",
    ):
        assert part in text, part
    assert 'datetime="20' in text.partition("Published")[2][:80]


@in_chromium
def test_a_hostile_description_runs_and_loads_nothing(site: Server, browser: Browser) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site.url}/project/causal-conv1d/")
    page.get_by_role("link", name="upstream").wait_for()
    assert page.evaluate("window.evil") is None
    assert {address.partition(site.url)[1] for address in asked} == {site.url}
    prose = page.locator(".prose")
    assert prose.locator("script, style, img, [onclick], [onerror], a[href^=javascript]").count() == 0
    assert prose.get_by_text("near").get_attribute("href") is None, "a link into the repository is plain text"
    page.close()


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        ("Title\n=====\n\n`a <https://a.example>`_\n", "text/x-rst", '<a href="https://a.example"'),
        ("Title\n=====\n\n.. include:: /etc/passwd\n", "", "<pre"),
        (".. raw:: html\n\n   <script>alert(1)</script>\n", "text/x-rst", "&lt;script&gt;"),
        ("<b>plain</b> & simple", "text/plain", "&lt;b&gt;plain&lt;/b&gt; &amp; simple"),
        ("# a\n" * 100_000, "text/markdown", '<pre tabindex="0"># a'),
        ('<img alt="a>b" src=x> <img src=x alt=\'"><script>\'>', "text/markdown", "a&gt;b"),
        ("UNKNOWN\n", "", ""),
    ],
)
def test_descriptions_of_each_kind(text: str, kind: str, part: str) -> None:
    rendered = render(text, kind)
    assert part in rendered
    assert "<script" not in rendered
    assert "root:" not in rendered
    assert bool(part) == bool(rendered)


DOUBLING = (
    "|a30|\n\n" + "".join(f".. |a{n}| replace:: |a{n - 1}| |a{n - 1}|\n" for n in range(30, 0, -1)) + ".. |a0| replace:: x\n"
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        pytest.param(DOUBLING, "", id="doubling"),
        pytest.param("<div>" * 50_000, "text/markdown", id="deep"),
        pytest.param("|a" * 4_000 + "|\n" + "|-" * 4_000 + "|\n" + "|a\n" * 8_000, "text/markdown", id="wide"),
    ],
)
def test_a_description_that_explodes_is_shown_as_text(text: str, kind: str) -> None:
    """Without limits, the first would use all memory, the second would take minutes, and the third has 32,000,000 cells."""
    assert render(text, kind) == f'<pre tabindex="0">{escape(text)}</pre>'


def test_headings_never_leave_a_level_out() -> None:
    rendered = render("### a\n\n# b\n\n###### c\n\n## d\n\n# e\n", "text/markdown")
    assert [line[1:3] for line in rendered.splitlines() if line.startswith("<h")] == ["h3", "h3", "h4", "h4", "h3"]


def test_metadata_that_cannot_be_read_leaves_the_rest() -> None:
    raw = (
        b"Metadata-Version: 2.1\nName: a\nVersion: 1\nRequires-Dist: foo bar\nHome-page: javascript:alert(1)\nProject-URL: x\n"
    )
    known = about(
        raw + b"License: " + b"very long " * 100 + b"\nClassifier: License :: OSI Approved :: MIT License\n\nZo\xeb\n"
    )
    assert known.links == ()
    assert known.dependencies[0].requirements == ("foo bar",)
    assert known.license == "MIT License"


@in_chromium
@pytest.mark.parametrize("host", ["127.0.0.1", SECOND_HOST])
def test_a_button_copies_the_line(site: Server, browser: Browser, host: str) -> None:
    """On loopback by the clipboard API, which is not available with plain http from another host."""
    page = browser.new_page()
    page.goto(f"http://{host}:{site.port}/project/flash-attn/")
    assert page.evaluate("Boolean(navigator.clipboard)") == (host == "127.0.0.1")
    page.locator(".copyable", has_text="choose.py").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    page.goto(f"http://{host}:{site.port}/")
    page.get_by_role("searchbox").focus()
    page.keyboard.press("Control+V")
    line = f"""python3 -c "import urllib.request as u; exec(u.urlopen('http://{host}:{site.port}/project/flash-attn/choose.py').read())\""""
    assert page.get_by_role("searchbox").input_value() == line
    page.close()


def row(name: str, summary: str = "") -> ProjectRow:
    return ProjectRow(name=name, version="1", summary=summary, cudas=(), status="active", updated="")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("flash_attn", ["flash-attn", "flash-attn-3"]),
        ("flash attn", ["flash-attn", "flash-attn-3"]),
        ("Flash.Attn", ["flash-attn", "flash-attn-3"]),
        ("attn", ["flash-attn", "flash-attn-3"]),
        ("exact attention", ["flash-attn"]),
        ("ATTENTION memory", ["flash-attn", "xformers"]),
        ("attention nothing", []),
        (" - _", ["flash-attn", "flash-attn-3", "xformers"]),
        ("", ["flash-attn", "flash-attn-3", "xformers"]),
    ],
)
def test_the_search_knows_names_and_summaries(wanted: str, names: list[str]) -> None:
    rows = [
        row("flash-attn", "Exact attention, little memory"),
        row("flash-attn-3"),
        row("xformers", "Memory-efficient attention"),
    ]
    assert [project.name for project in search(rows, wanted)] == names


def test_the_search_page(site: Server) -> None:
    for wanted in ("flash_attn", "flash attn", "memory-efficient"):
        text = site.client.get("/", params={"q": wanted}).text
        assert ("project/flash-attn/" in text, "project/einops/" in text) == (True, False), wanted
    assert "No project matches “zzz”" in site.client.get("/", params={"q": "zzz"}).text


@pytest.mark.slow
def test_an_export_has_the_pages_and_the_program(site: Server, tmp_path: Path) -> None:
    run_index(site.root, "export", str(tmp_path / "tree"), "--url", site.url)
    project = tmp_path / "tree" / "project" / "causal-conv1d"
    assert (project / "choose.py").read_text() == site.client.get("/project/causal-conv1d/choose.py").text
    assert "<form" not in (project / "index.html").read_text()
    assert (tmp_path / "tree" / "static" / "copy.js").exists()
    before = (project / "choose.py").stat().st_mtime_ns
    run_index(site.root, "export", str(tmp_path / "tree"), "--url", site.url)
    assert (project / "choose.py").stat().st_mtime_ns == before, "nothing has changed"


@in_chromium
def test_no_column_of_the_first_page_is_squeezed(site: Server, browser: Browser) -> None:
    """The long summary of another project takes the width that is left, and no more."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(site.url)
    page.evaluate("document.querySelector('tbody th .note').textContent = 'Grouped GEMM '.repeat(60)")
    heights = page.locator("thead th").evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().height)")
    assert len(heights) == 4
    assert max(heights) < 45, "one line each"
    page.close()
