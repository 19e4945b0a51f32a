"""The index refuses uploads that other indexes accept: wrong digests, names, forms and tags."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from index_kit import Server, nothing_stored, refused, run_index, sdist, serving, wheel


@pytest.mark.parametrize("field", ["sha256_digest", "md5_digest", "blake2_256_digest"])
def test_a_wrong_digest_is_refused(shared: Server, field: str) -> None:
    name, content = wheel("digest_pkg")
    wrong = {"sha256_digest": "0" * 64, "md5_digest": "0" * 32, "blake2_256_digest": "0" * 64}[field]
    refused(shared.upload(name, content, form={field: wrong}), field)
    nothing_stored(shared, "digest-pkg")


@pytest.mark.parametrize("field", ["md5_digest", "blake2_256_digest"])
def test_a_wrong_digest_is_refused_when_it_comes_after_the_file(shared: Server, field: str) -> None:
    name, content = wheel("late_pkg")
    parts = [
        (None, ":action", b"file_upload"),
        (name, "content", content),
        (None, field, b"0" * (32 if field == "md5_digest" else 64)),
    ]
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (key.encode(), b'; filename="%s"' % filename.encode() if filename else b"", value)
        for filename, key, value in parts
    )
    answer = shared.client.post(
        "/legacy/",
        content=body + b"--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
        auth=("__token__", shared.token),
    )
    refused(answer, field)


def test_right_digests_of_every_kind_are_taken(shared: Server) -> None:
    name, content = wheel("digests_pkg")
    form = {
        "md5_digest": hashlib.md5(content).hexdigest(),
        "blake2_256_digest": hashlib.blake2b(content, digest_size=32).hexdigest(),
    }
    assert shared.upload(name, content, form=form).status_code == 200


def test_what_pypi_takes_of_older_clients_is_taken(shared: Server) -> None:
    """The action in the query, and a signature in addition to the file, which is ignored."""
    name, content = wheel("signed_pkg")
    answer = shared.client.post(
        "/legacy/?:action=file_upload",
        data={"protocol_version": "1"},
        files={"content": (name, content), "gpg_signature": (f"{name}.asc", b"-----BEGIN PGP SIGNATURE-----\n")},
        auth=("__token__", shared.token),
    )
    assert answer.status_code == 200, answer.text
    assert shared.client.get(shared.page("signed-pkg").json()["files"][0]["url"].replace("../..", "")).content == content
    assert not list((shared.root / "staging").iterdir())
    other = shared.client.post(
        "/legacy/?:action=doc_upload", files={"content": (name, content)}, auth=("__token__", shared.token)
    )
    refused(other, "'doc_upload'")


def test_form_that_disagrees_with_the_file_is_refused(shared: Server) -> None:
    name, content = wheel("form_pkg")
    refused(shared.upload(name, content, form={"name": "other"}), "'other'")
    refused(shared.upload(name, content, form={"version": "2.0"}), "'2.0'")
    refused(shared.upload(name, content, form={"version": "9" * 5000}), "the form names the version")
    refused(shared.upload(name, content, form={"filetype": "sdist"}), "'sdist'")
    refused(shared.upload(name, content, form={":action": "submit"}), "'submit'")
    nothing_stored(shared, "form-pkg")


def test_same_bytes_again_are_fine_and_other_bytes_are_not(shared: Server) -> None:
    name, content = wheel("twice_pkg")
    assert shared.upload(name, content).status_code == 200
    assert shared.upload(name, content).status_code == 200
    _, other = wheel("twice_pkg", files={"twice_pkg/__init__.py": b"changed = True\n"})
    refused(shared.upload(name, other), "File already exists")
    files = shared.page("twice-pkg").json()["files"]
    assert [item["hashes"]["sha256"] for item in files] == [hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize(
    "filename",
    [
        "Evil.Pkg-1.0-py3-none-any.whl",
        "evil.pkg-1.0-py3-none-any.whl",
        "Evil_Pkg-1.0-py3-none-any.whl",
        "evil_pkg-1.0-PY3-none-any.whl",
    ],
)
def test_other_spellings_of_a_name_are_refused(shared: Server, filename: str) -> None:
    name = filename.partition("-")[0]
    _, content = wheel(name)
    refused(shared.upload(filename, content, form={"name": name}), "canonical")


def test_one_release_has_one_spelling(shared: Server) -> None:
    assert shared.upload(*wheel("spelled_pkg", "1.0")).status_code == 200
    refused(shared.upload(*wheel("spelled_pkg", "1.0.0")), "the files of this release on this index have the version 1.0")


PLAIN = "is not a plain file name"
NAMES = {
    # File name to send: project and version of the wheel inside (valid except for the name), and words of the error.
    "../up_pkg-1.0-py3-none-any.whl": ("up_pkg", "1.0", PLAIN),
    "../../../../../../tmp/gf_up_pkg-1.0-py3-none-any.whl": ("gf_up_pkg", "1.0", PLAIN),
    "/tmp/gf_abs_pkg-1.0-py3-none-any.whl": ("gf_abs_pkg", "1.0", PLAIN),
    "folder/in_pkg-1.0-py3-none-any.whl": ("in_pkg", "1.0", PLAIN),
    "..\\back_pkg-1.0-py3-none-any.whl": ("back_pkg", "1.0", PLAIN),
    "C:\\back_pkg-1.0-py3-none-any.whl": ("back_pkg", "1.0", PLAIN),
    "space pkg-1.0-py3-none-any.whl": ("space pkg", "1.0", PLAIN),
    "\u00e4_pkg-1.0-py3-none-any.whl": ("\u00e4_pkg", "1.0", PLAIN),
    ".hidden_pkg-1.0-py3-none-any.whl": (".hidden_pkg", "1.0", PLAIN),
    "nul\x00_pkg-1.0-py3-none-any.whl": ("nul_pkg", "1.0", ""),
    "trail_pkg-1.0-py3-none-any.whl ": ("trail_pkg", "1.0", PLAIN),
    "line_pkg-1.0-py3-none-any.whl\x0b": ("line_pkg", "1.0", PLAIN),
    "zip_pkg-1.0.zip": ("zip_pkg", "1.0", "neither a wheel nor an sdist"),
    "noversion.zip": ("noversion", "1.0", "neither a wheel nor an sdist"),
    "exe_pkg-1.0.exe": ("exe_pkg", "1.0", "neither a wheel nor an sdist"),
    "meta_pkg-1.0-py3-none-any.whl.metadata": ("meta_pkg", "1.0", "neither a wheel nor an sdist"),
    "short_pkg-1.0.whl": ("short_pkg", "1.0", "is not a wheel's name"),
    "not_pkg-not.a.version-py3-none-any.whl": ("not_pkg", "not.a.version", "is not a wheel's name"),
    "long_pkg-1.0+" + "l" * 260 + "-py3-none-any.whl": ("long_pkg", "1.0+" + "l" * 260, "longer than 255 bytes"),
}


@pytest.mark.parametrize("filename", NAMES)
def test_file_names_that_no_installer_means_are_refused(shared: Server, filename: str) -> None:
    """Each is refused for its name: the wheel inside is valid and has that project and version."""
    name, version, words = NAMES[filename]
    before = everything_beside(shared)
    answer = post_file(shared, filename, wheel(name, version)[1])
    if words:
        refused(answer, words)
    else:  # a NUL in a header: the form is refused before the name is read
        assert answer.status_code == 400
        assert answer.text.strip()
    assert everything_beside(shared) == before


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("..-1.0.tar.gz", PLAIN),
        ("sdist_pkg-1.0.tar.bz2", "neither a wheel nor an sdist"),
        ("sdist_pkg.tar.gz", "not an sdist"),
    ],
)
def test_file_names_of_sdists_are_refused_for_their_name(shared: Server, filename: str, words: str) -> None:
    before = everything_beside(shared)
    refused(post_file(shared, filename, sdist(filename.partition("-")[0].removesuffix(".tar.gz"))[1]), words)
    assert everything_beside(shared) == before


def post_file(server: Server, filename: str, content: bytes) -> httpx.Response:
    """An upload with a raw file name, which a client would clean."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n'
        b'--b\r\nContent-Disposition: form-data; name="content"; filename="'
        + filename.replace("\\", "\\\\").encode()
        + b'"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return server.client.post("/legacy/", content=body, headers=headers, auth=("__token__", server.token))


def everything_beside(server: Server) -> set[str]:
    """Every file in and around the root except catalogue and logs, and at the absolute names."""
    paths = {str(path) for path in server.root.parent.rglob("*") if path.suffix != ".log" and path.parent.name != "catalogue"}
    return paths | {str(path) for path in Path("/tmp").glob("gf_*_pkg*")}


def test_an_empty_file_name_is_refused(shared: Server) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n--b\r\n'
    body += b'Content-Disposition: form-data; name="content"; filename=""\r\n\r\nx\r\n--b--\r\n'
    answer = shared.client.post(
        "/legacy/", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}, auth=("__token__", shared.token)
    )
    refused(answer, "no file name")


def test_a_local_version_is_welcome(shared: Server) -> None:
    assert shared.upload(*wheel("local_pkg", "1.0+cu130")).status_code == 200
    assert shared.page("local-pkg").json()["files"][0]["_cuda"] == "13.0"


def test_one_of_eight_concurrent_uploads_of_one_name_wins(shared: Server) -> None:
    barrier = threading.Barrier(8)

    def send(number: int) -> int:
        name, content = wheel("race_pkg", files={"race_pkg/__init__.py": f"N = {number}\n".encode()})
        barrier.wait()
        return shared.upload(name, content).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(send, range(8)))
    assert statuses == [200] + [400] * 7
    assert len(shared.filenames("race-pkg")) == 1


def test_names_that_nobody_hosts_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("host") / "root") as server:
        refused(server.upload(*wheel("new_pkg")), "does not host new-pkg", status=403)
        nothing_stored(server, "new-pkg")
        run_index(server.root, "host", "New.Pkg")
        assert server.upload(*wheel("new_pkg")).status_code == 200
        run_index(server.root, "host", "--remove", "new-pkg")
        refused(server.upload(*wheel("new_pkg", "2.0")), "does not host", status=403)
        assert server.filenames("new-pkg") == ["new_pkg-1.0-py3-none-any.whl"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"nonsense",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\xfe\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name=":action"\r\n\r\nfile_upload\r\n--b--\r\n',
    ],
)
def test_forms_that_are_none_are_refused(shared: Server, body: bytes) -> None:
    answer = shared.client.post(
        "/legacy/", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}, auth=("__token__", shared.token)
    )
    assert answer.status_code == 400, answer.text


def test_another_content_type_is_refused(shared: Server) -> None:
    answer = shared.client.post(
        "/legacy/", content=b"{}", headers={"Content-Type": "application/json"}, auth=("__token__", shared.token)
    )
    refused(answer, "multipart/form-data")


@pytest.mark.parametrize(
    ("tags", "kind"), [("py3-none-notatag", "platform"), ("zz9-none-any", "Python"), ("py3-what-any", "ABI")]
)
def test_a_wheel_that_no_installer_would_choose_is_refused(shared: Server, tags: str, kind: str) -> None:
    refused(shared.upload(*wheel("tagged_pkg", tags=tags)), f"not a known {kind} tag")


@pytest.mark.parametrize("name", [".hidden", "a b", "\u00e4"])
def test_odd_names_are_refused_for_their_name(shared: Server, name: str) -> None:
    refused(shared.upload(*wheel(name)), "not a plain file name")
