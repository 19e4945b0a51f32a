"""Properties for any input: names, headers, forms. Pure functions where possible, else a live server."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_kit import JSON, Server
from packaging.utils import canonicalize_name
from packaging.version import Version

from index.errors import RefusalError
from index.names import check_set_name, parse_filename
from index.simple_api import negotiate
from index.store import facts

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_]{0,20}[a-z0-9])?", fullmatch=True).filter(lambda text: "__" not in text)
VERSIONS = st.builds(
    lambda release, pre, local: str(Version(".".join(map(str, release)) + pre + local)),
    st.lists(st.integers(0, 2026), min_size=1, max_size=4),
    st.sampled_from(["", "a1", "b2", "rc3", ".post1", ".dev20261123"]),
    st.sampled_from(["", "+cu130", "+cu.12.8.torch.2.11"]),
)
TAGS = st.sampled_from(
    ["py3-none-any", "cp311-cp311-manylinux_2_34_aarch64", "cp39-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64"]
)


@given(name=NAMES, version=VERSIONS, tags=TAGS)
def test_canonical_wheel_names_are_read(name: str, version: str, tags: str) -> None:
    distribution = parse_filename(f"{name}-{version}-{tags}.whl")
    assert (distribution.project, distribution.version) == (canonicalize_name(name), version)


@given(st.text(max_size=300))
def test_any_file_name_is_read_or_refused(text: str) -> None:
    for name in (text, text + ".whl", text + "-1.0-py3-none-any.whl", text + ".tar.gz"):
        try:
            distribution = parse_filename(name)
        except RefusalError:
            continue
        assert "/" not in distribution.filename
        assert not distribution.filename.startswith(".")
        assert len(distribution.filename.encode()) <= 255


@given(st.text(max_size=80))
def test_any_set_name_is_one_segment_or_refused(text: str) -> None:
    try:
        assert check_set_name(text) == text
    except RefusalError:
        return
    assert "/" not in text
    assert text not in (".", "..", "simple", "files")


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=200))
def test_any_accept_header_is_answered(header: str) -> None:
    assert negotiate.content_type(header) in (None, negotiate.JSON, negotiate.HTML, negotiate.PLAIN)
    assert negotiate.encoding(header) in ("", "gzip", "zstd")


@given(
    st.lists(
        st.tuples(st.sampled_from([negotiate.JSON, negotiate.HTML, negotiate.PLAIN]), st.integers(0, 10)),
        min_size=1,
        max_size=3,
        unique_by=lambda item: item[0],
    )
)
def test_the_best_quality_wins(offers: list[tuple[str, int]]) -> None:
    header = ", ".join(f"{media};q={quality / 10}" for media, quality in offers)
    best = max(quality for _, quality in offers)
    chosen = negotiate.content_type(header)
    if best == 0:
        assert chosen is None
    else:
        assert (chosen, best) in offers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=1000, blacklist_characters="#?"), max_size=60),
    accept=st.sampled_from([JSON, "text/html", "*/*", "x", ""]),
)
@pytest.mark.parametrize("place", ["/simple/", "/files/", "/packages/", "/project/", "/wheel/", "/records/", "/board/", "/"])
def test_no_address_is_an_error_of_ours(shared: Server, place: str, path: str, accept: str) -> None:
    from urllib.parse import quote

    answer = shared.client.get(place + quote(path), headers={"Accept": accept})
    assert answer.status_code < 500, (place, path, answer.text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from([":action", "name", "version", "filetype", "sha256_digest", "md5_digest", "protocol_version", "x"]),
        st.text(max_size=40),
    ),
    filename=st.text(min_size=1, max_size=60).map(lambda text: text.replace('"', "")),
    content=st.binary(max_size=200),
)
def test_no_form_is_an_error_of_ours(shared: Server, fields: dict[str, str], filename: str, content: bytes) -> None:
    fields = {":action": "file_upload", **fields}
    answer = shared.client.post(
        "/legacy/", data=fields, files={"content": (filename, content)}, auth=("__token__", shared.token)
    )
    assert answer.status_code in (400, 429), answer.text
    assert answer.text.strip()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=400))
def test_no_body_is_an_error_of_ours(shared: Server, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for content in (
        body,
        b"--b\r\n" + body,
        b'--b\r\nContent-Disposition: form-data; name="content"; filename="x"\r\n\r\n' + body,
    ):
        answer = shared.client.post("/legacy/", content=content, headers=headers, auth=("__token__", shared.token))
        assert answer.status_code in (400, 429), answer.text


@pytest.mark.parametrize(
    ("requires", "torch", "only"),
    [
        (["torch==2.11.*"], "2.11", "2.11"),
        (["torch==2.11.0"], "2.11.0", "2.11"),
        (["torch==2.11.0+cu130"], "2.11.0+cu130", "2.11"),
        (["torch===2.11.0"], "2.11.0", "2.11"),
        (["torch~=2.11.0"], "2.11", "2.11"),
        (["torch>=2.11,<2.12"], "2.11", "2.11"),
        (["torch (>2.11.0,<2.11.5)"], "2.11", "2.11"),
        (["torch>=2.11", "einops", 'torch<2.12; sys_platform == "linux"'], "2.11", "2.11"),
        (["torch>=2.11.0rc1,<=2.11.1"], "2.11", "2.11"),
        (["torch~=2.11"], None, None),
        (["torch>=2.11,<=2.12"], None, None),
        (["torch>=2.11,!=2.12.*"], None, None),
        (["torch<2.12"], None, None),
        (["torch>=2.11,<3"], None, None),
        (["torch==2.*"], "2", None),
        (["torch!=2.11.*"], None, None),
        (["torch"], None, None),
        (["torch<2.11,>2.11"], None, None),
        (['torch==2.11.*; extra == "test"'], None, None),
        (["torch===of-my-own"], "of-my-own", None),
        ([f"torch=={'9' * 5000}.1"], "9" * 5000 + ".1", None),
    ],
)
def test_a_wheel_is_for_one_torch_when_its_requirements_admit_no_other(
    requires: list[str], torch: str | None, only: str | None
) -> None:
    known = facts.from_name(parse_filename("a-1.0+cu130-py3-none-any.whl"), requires)
    assert (known.torch, known.built_for) == (torch, only)
