"""Random METADATA by Hypothesis: pip and uv must resolve every wheel that the index accepts.

GRACEFARM_FUZZ_SECONDS sets the duration (60; 600 before a release).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from index_kit import Server, serving, wheel
from test_index_clients import clean

BUDGET = float(os.environ.get("GRACEFARM_FUZZ_SECONDS", "60"))
"Seconds."

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), max_size=40)
WORDS = st.sampled_from(
    ["", *["libdep", "Lib.Dep", "missing-pkg", "lib dep", "é", "-x", "libdep[a]", "libdep[a,b]", "libdep["], "x" * 300]
)
SPECIFIERS = st.sampled_from(
    [
        "",
        ">=1",
        "==1.*",
        ">=1.0.*",
        "~=1",
        "~=1.0",
        "===any",
        "==1.0+l",
        "<2,>=0",
        ">>1",
        "(>=1)",
        "(>=1",
        "==1.0-legacy-x",
        "!=1.0 ,",
        ">=1;",
        "==1!1",
        ">=1.0.dev1",
        "=1",
        "<1a",
        "@x",
        " @ https://example.invalid/x.whl",
        " @ file:///etc/passwd",
    ]
)
VARIABLES = st.sampled_from(
    [
        "python_version",
        "python_full_version",
        "os_name",
        "sys_platform",
        "platform_release",
        "platform_version",
        "platform_machine",
        "extra",
        "extras",
        "dependency_groups",
        "implementation_name",
        "implementation_version",
        "pythonversion",
        "os.name",
        "'3'",
    ]
)
OPERATORS = st.sampled_from(["==", "!=", "<", ">=", "~=", "===", "in", "not in", "=", "=>"])
VALUES = st.sampled_from(
    ["'3.8'", "'x'", "''", "'linux'", "'3.*'", "'1,2'", '"3"', "'é'", "x", "'3", "platform_machine", "'a\\'"]
)
CLAUSES = st.one_of(
    st.tuples(VARIABLES, OPERATORS, VALUES), st.tuples(VALUES, OPERATORS, VARIABLES)
).map(" ".join)  # fmt: skip
MARKERS = st.recursive(
    CLAUSES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or ", " , "]), inner).map("".join),
        st.tuples(inner, st.integers(0, 400)).map(lambda item: "(" * item[1] + item[0] + ")" * item[1]),
    ),
    max_leaves=5,
)
REQUIREMENTS = st.one_of(
    st.tuples(WORDS, SPECIFIERS).map("".join),
    st.tuples(WORDS, SPECIFIERS, st.just(" ; "), MARKERS).map("".join),
    TEXTS,
)
FIELDS: dict[str, st.SearchStrategy[str]] = {
    "Requires-Dist": REQUIREMENTS,
    "Requires-Python": st.one_of(SPECIFIERS, TEXTS, st.sampled_from([">=3.8", "<4", ">=3.x", "!=3.0.*"])),
    "Provides-Extra": st.one_of(st.sampled_from(["a", "b", "A_b", "a-b", "b@d!", ""]), TEXTS),
    "Dynamic": st.sampled_from(["Name", "Requires-Dist", "version", "x", "Author"]),
    "License-Expression": st.sampled_from(["MIT", "MIT OR Apache-2.0", "Nonsense-1.0", "(MIT", "LicenseRef-x", "mit AND"]),
    "License": TEXTS,
    "License-File": st.sampled_from(["LICENSE", "../x", "/x", "*"]),
    "Import-Name": st.sampled_from(["a", "a.b", "1a", "class", "a ; private", ""]),
    "Project-URL": st.one_of(
        TEXTS, st.sampled_from(["Home, https://x.org", "x", ", https://x.org", "a, ftp://x", "Home, https://[x"])
    ),
    "Home-page": st.one_of(TEXTS, st.sampled_from(["https://x.org", "UNKNOWN", "http://", "https://[::1"])),
    "Description-Content-Type": st.sampled_from(
        ["text/markdown", "text/x-rst; charset=latin-1", "text/plain; x*", "x", "text/html"]
    ),
    "Keywords": TEXTS,
    "Classifier": TEXTS,
    "Author": TEXTS,
    "Author-email": TEXTS,
    "Summary": TEXTS,
    "Description": TEXTS,
    "Name": WORDS,
    "Version": st.sampled_from(["1.1", "1.1.0", "v1.1", "1.2"]),
    "Metadata-Version": st.sampled_from(["2.1", "9.9"]),
    "Requires": TEXTS,
    "Obsoletes-Dist": REQUIREMENTS,
    "Content-Type": st.sampled_from(["multipart/mixed; boundary=b", "text/plain; charset=utf-16", "message/rfc822"]),
    "Content-Transfer-Encoding": st.sampled_from(["base64", "quoted-printable", "x"]),
    "Colour": TEXTS,
}
LINES = st.one_of(
    *(st.tuples(st.just(field), values).map(lambda item: f"{item[0]}: {item[1]}\n") for field, values in FIELDS.items()),
    st.tuples(st.sampled_from(list(FIELDS)), TEXTS).map(lambda item: f"{item[0]}:\n  {item[1]}\n"),
    TEXTS.map(lambda text: text + "\n"),
)
NEWEST = st.sampled_from(["2.1", "2.1", "2.4", "2.4", "2.5", "1.2", "2.6", "2.0", "2.7", "9.9"])
DAMAGES = st.one_of(
    st.just(None), st.just(None), st.just(None), st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3))
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """METADATA of `NAME` 1.1: mostly valid fields, some invalid ones, rarely bytes that are not text."""
    lines = "".join(draw(st.lists(LINES, max_size=4)))
    body = draw(st.one_of(st.just(""), TEXTS, st.just("--b\n\nx\n--b--\n")))
    text = f"Metadata-Version: {draw(NEWEST)}\nName: NAME\nVersion: 1.1\n{lines}\n{body}".encode()
    damage = draw(DAMAGES)
    return text if damage is None else text[: damage[0]] + damage[1] + text[damage[0] :]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("fuzz") / "root", "--allow-new", "--writes-per-second", "100000") as server:
        assert server.upload(*wheel("libdep")).status_code == 200
        yield server


@pytest.mark.slow
@pytest.mark.timeout(2 * BUDGET + 600)  # a batch that began in time may finish, and a failing batch is repeated one by one
def test_what_is_taken_resolves(fuzzed: Server, tmp_path: Path) -> None:
    numbers = itertools.count()
    counts = {"taken": 0, "refused": 0}

    @settings(max_examples=2, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.lists(documents(), min_size=16, max_size=16))
    def batch(metas: list[bytes]) -> None:
        taken = {}
        for meta in metas:
            name = f"fuzz_{next(numbers)}"
            assert fuzzed.upload(*wheel(name)).status_code == 200
            document = meta.replace(b"NAME", name.encode())
            answer = fuzzed.upload(*wheel(name, "1.1", meta=document))
            assert answer.status_code in (200, 400), answer.text
            counts["taken" if answer.status_code == 200 else "refused"] += 1
            if answer.status_code == 200:
                taken[name] = document
        if resolve(fuzzed, tmp_path, list(taken)):
            for name, document in taken.items():
                assert resolve(fuzzed, tmp_path, [name]) == "", document

    until = time.monotonic() + BUDGET
    for number in itertools.count():
        hypothesis.seed(number)(batch)()
        if time.monotonic() > until:
            break
    print(counts)
    assert min(counts.values()) > 10, counts


def resolve(server: Server, folder: Path, names: list[str]) -> str:
    """Errors of pip and uv while they resolve these projects, with and without an extra; empty on success."""
    wanted = [name.replace("_", "-") for name in names]
    wanted = [f"{name}[a]" if number % 2 else name for number, name in enumerate(wanted)]
    index = server.url + "/simple/"
    pip = ["-m", "pip", "install", "--no-cache-dir", "--ignore-installed", "--index-url", index]
    uv = ["-m", "uv", "pip", "install", "--no-cache", "--default-index", index]
    for tool in (pip, uv) if names else ():
        process = subprocess.run(
            [sys.executable, *tool, "--dry-run", "--target", str(folder / "t"), *wanted],
            env=clean(), capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if process.returncode != 0 or "Traceback" in process.stderr:
            return process.stdout[-2000:] + process.stderr[-4000:]
    return ""
