"""Wheel variants (PEP 825) in the index: the JSON file of a release, and the wheels that are refused."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
from index_kit import Server, run_index, serving
from variants_kit import NVIDIA, TAGS, VARIANTS, farm, filled, labels, link, metadata, plain_wheel, variant_wheel

from gracefarm import variants
from gracefarm.variants import Variant
from index.names import parse_filename

__all__ = ["farm", "filled"]


def test_the_json_is_a_file_like_any_other(filled: Server) -> None:
    item = link(filled, "choice-pkg")
    assert item is not None
    assert item["hashes"]
    assert item["upload-time"]
    assert item["yanked"] is False
    assert link(filled, "choice-pkg") == item
    url = f"/simple/choice-pkg/{item['url']}"
    answer = filled.client.get(url)
    assert answer.headers["content-type"] == "application/json"
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["etag"] == '"' + item["hashes"]["sha256"] + '"'  # type: ignore[index]
    again = filled.client.get(url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.headers["etag"]) == (304, answer.headers["etag"])
    head = filled.client.head(url)
    assert head.headers["content-length"] == str(len(answer.content))
    assert answer.json() == {
        "$schema": variants.SCHEMA,
        "default-priorities": {"namespace": ["nvidia"]},
        "providers": {"nvidia": NVIDIA},
        "variants": VARIANTS,
    }
    assert f"{item['filename']}</a>" in filled.page("choice-pkg", accept="text/html").text
    wrong = url.replace("variants.json", "x-variants.json")
    assert filled.client.get(wrong).status_code == 404


def test_facts_that_nothing_else_names_are_those_of_variant_json(farm: Server) -> None:
    """Without a record and a local version, only variant.json has CUDA and sm."""
    several = {"cuda_version_lower_bound": ["13.1", "12.9"], "sm_arch": ["90a_real", "100_real", "100_virtual"]}
    odd = {"cuda_version_lower_bound": ["x", "13"], "sm_arch": ["all"]}
    cases: tuple[tuple[str, str, dict[str, list[str]], tuple[str | None, list[str] | None]], ...] = (
        ("1.0", "cu130_sm90", VARIANTS["cu130_sm90"]["nvidia"], ("13.0", ["90"])),
        ("2.0", "several", several, ("12.9", ["90a", "100"])),
        ("3.0", "odd", odd, (None, None)),
        ("4.0+cu128", "cu130_sm90", VARIANTS["cu130_sm90"]["nvidia"], ("12.8", ["90"])),
    )
    for version, label, features, _ in cases:
        inside = metadata(label, variants={label: {"nvidia": features}})
        assert farm.upload(*variant_wheel("fact_pkg", label, version, inside=inside)).status_code == 200
    assert farm.upload(*variant_wheel("fact_pkg", "null", "5.0")).status_code == 200
    files = {
        item["filename"].split("-")[1]: item
        for item in farm.page("fact-pkg").json()["files"]
        if item["filename"].endswith(".whl")
    }
    for version, _, _, known in cases:
        assert (files[version].get("_cuda"), files[version].get("_sm")) == known
    assert "_cuda" not in files["5.0"]
    assert "fact_pkg-1.0-py3-none-any-cu130_sm90.whl" in farm.filenames("fact-pkg", prefix="/cu130")
    page = farm.client.get("/project/fact-pkg/?cuda=13.0&sm=90").text
    assert "fact_pkg-1.0-py3-none-any-cu130_sm90.whl" in page
    assert "fact_pkg-2.0" not in page


def test_the_json_follows_the_wheels(farm: Server) -> None:
    name, project = "step_pkg", "step-pkg"
    assert farm.upload(*plain_wheel(name)).status_code == 200
    assert link(farm, project) is None, "plain wheels do not require it"
    assert farm.upload(*variant_wheel(name, "cu130_sm90")).status_code == 200
    assert labels(farm, project) == ["cu130_sm90"]
    former = link(farm, project)
    assert farm.upload(*variant_wheel(name, "null")).status_code == 200
    assert labels(farm, project) == ["cu130_sm90", "null"]
    assert former is not None
    assert farm.client.get(f"/simple/{project}/{former['url']}").status_code == 200, "a client may cache the page for a minute"
    assert farm.upload(*variant_wheel(name, "cu124_sm90", "2.0")).status_code == 200
    assert labels(farm, project) == ["cu130_sm90", "null"], "each release has another one"

    run_index(farm.root, "yank", project, "1.0", "--reason", "does not load")
    yanked = link(farm, project)
    assert yanked is not None
    assert yanked["yanked"] == "does not load"
    run_index(farm.root, "unyank", project, "1.0")
    back = link(farm, project)
    assert back is not None
    assert back["yanked"] is False

    run_index(farm.root, "delete", project, "1.0", "--yes")
    assert link(farm, project) is None
    assert farm.client.get(f"/simple/{project}/{former['url']}").status_code == 410
    assert labels(farm, project, version="2.0") == ["cu124_sm90"]


def test_a_wheel_that_was_lost_is_not_in_the_json(tmp_path: Path) -> None:
    with serving(tmp_path / "root", "--allow-new", "--variants") as server:
        for label in ("cu130_sm90", "null"):
            assert server.upload(*variant_wheel("lost_pkg", label)).status_code == 200
        digest = next(
            item["hashes"]["sha256"] for item in server.page("lost-pkg").json()["files"] if "-null." in item["filename"]
        )
    path = tmp_path / "root" / "files" / digest[:2] / digest
    path.rename(tmp_path / "away")
    with serving(tmp_path / "root") as server:
        assert labels(server, "lost-pkg") == ["cu130_sm90"]
    (tmp_path / "away").rename(path)
    with serving(tmp_path / "root") as server:
        assert labels(server, "lost-pkg") == ["cu130_sm90", "null"]


def test_a_wheel_of_another_version_of_the_format_is_passed_over(tmp_path: Path) -> None:
    """After an upgrade to the next draft, the index starts, and the old wheel is not supported (PEP 825)."""
    with serving(tmp_path / "root", "--allow-new", "--variants") as server:
        for label in ("cu130_sm90", "null"):
            assert server.upload(*variant_wheel("draft_pkg", label)).status_code == 200
    with closing(sqlite3.connect(tmp_path / "root" / "catalogue" / "catalogue.db")) as database, database:
        old = "UPDATE file SET variant = replace(variant, 'v0.2.0', 'v0.0.1') WHERE filename LIKE '%sm90.whl'"
        assert database.execute(old).rowcount == 1
    with serving(tmp_path / "root", "--variants") as server:
        assert labels(server, "draft-pkg") == ["null"]
        assert server.upload(*variant_wheel("draft_pkg", "cu130_sm100")).status_code == 200
        assert labels(server, "draft-pkg") == ["cu130_sm100", "null"]


def test_a_staged_sets_variants_are_in_its_preview_alone(farm: Server) -> None:
    assert farm.upload(*variant_wheel("stage_pkg", "null")).status_code == 200
    created = run_index(farm.root, "stage", "create", "variant-set", "--json").stdout
    preview = json.loads(created)["preview_path"].removesuffix("/simple/")
    assert farm.upload(*variant_wheel("stage_pkg", "cu130_sm90"), path="/stage/variant-set/legacy/").status_code == 200
    assert labels(farm, "stage-pkg") == ["null"]
    assert labels(farm, "stage-pkg", prefix=preview) == ["cu130_sm90", "null"]
    run_index(farm.root, "stage", "publish", "variant-set")
    for prefix in ("", "/variant-set"):
        assert labels(farm, "stage-pkg", prefix=prefix) == ["cu130_sm90", "null"]


def test_an_export_holds_the_json_that_its_pages_name(filled: Server, tmp_path: Path) -> None:
    run_index(filled.root, "export", str(tmp_path / "tree"))
    page = tmp_path / "tree" / "simple" / "choice-pkg"
    files = json.loads((page / "index.json").read_text())["files"]
    assert len(files) == len(VARIANTS) + 2
    for item in files:
        assert (page / item["url"].replace("%2B", "+")).resolve().stat().st_size == item["size"]
    live = filled.page("choice-pkg").content
    assert (page / "index.json").read_bytes() == live


def test_a_folder_of_variants_is_imported(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    for name, content in (plain_wheel("folder_pkg"), variant_wheel("folder_pkg", "null")):
        (tmp_path / "wheels" / name).write_bytes(content)
    refused = run_index(tmp_path / "root", "import", str(tmp_path / "wheels"), check=False)
    assert "1 imported, 0 already stored, 1 refused" in refused.stdout
    assert "accepts only plain wheels" in refused.stdout
    imported = run_index(tmp_path / "root", "import", "--variants", str(tmp_path / "wheels"))
    assert "1 imported, 1 already stored, 0 refused" in imported.stdout


# --- refusals ---------------------------------------------------------------------------------------------------------------


def test_an_index_without_the_switch_takes_no_variants(shared: Server) -> None:
    answer = shared.upload(*variant_wheel("switch_pkg", "null"))
    assert answer.status_code == 403
    assert "--variants" in answer.text


def sm80(label: str = "cu130_sm90") -> bytes:
    return metadata(label, variants={label: {"nvidia": {"sm_arch": ["80_real"]}}})


@pytest.mark.parametrize(
    ("inside", "sentence"),
    [
        (metadata("cu124_sm90"), "variant.json describes the variant cu124_sm90, but the file name has the label cu130_sm90"),
        (metadata("cu130_sm90", variants={}), "describes no variant"),
        (metadata("cu130_sm90", variants={"cu130_sm90": {}}), "but only the variant null may have no properties"),
        (metadata("cu130_sm90", variants={"cu130_sm90": {"nvidia": {"sm_arch": "90_real"}}}), "a list of values"),
        (metadata("cu130_sm90", variants={"cu130_sm90": {"nvidia": {"sm_arch": [90]}}}), "a list of values"),
        (metadata("cu130_sm90", variants={"cu130_sm90": {"nvidia": {"sm_arch": []}}}), "a list of values"),
        (metadata("cu130_sm90", variants={"cu130_sm90": {"NVIDIA": {"sm_arch": ["90_real"]}}}), "a list of values"),
        (metadata("cu130_sm90", variants=["cu130_sm90"]), "describes no variant"),
        (metadata("cu130_sm90", **{"default-priorities": {"namespace": ["cpu"]}}), "no priority for the namespace 'nvidia'"),
        (metadata("cu130_sm90", **{"default-priorities": {}}), "default-priorities.namespace: Field required"),
        (metadata("cu130_sm90", **{"default-priorities": {"namespace": []}}), "default-priorities.namespace: List"),
        (metadata("cu130_sm90", **{"default-priorities": {"namespace": ["nvidia"] * 2}}), "names a namespace twice"),
        (metadata("cu130_sm90", providers=5), "providers: Input should be"),
        (metadata("cu130_sm90", providers={"nvidia": {"requires": "x"}}), "providers.nvidia.requires: Input should be"),
        (metadata("cu130_sm90", n=1), "n: Extra inputs are not permitted"),
        (metadata("cu130_sm90", n=float("nan")), "cannot be read as JSON"),
        (metadata("cu130_sm90", n=float("-inf")), "cannot be read as JSON"),
        (b"\xef\xbb\xbf" + metadata("cu130_sm90"), "cannot be read as JSON (UTF-8 without a byte order mark)"),
        (metadata("cu130_sm90").decode().encode("utf-16"), "cannot be read as JSON (UTF-8 without a byte order mark)"),
        (metadata("cu130_sm90", **{"$schema": "https://example.org/v9.json"}), "does not have the format"),
        (b"[" * 60_000, "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "does not have the format"),
        (b" " * 70_000, "has 70000 bytes"),
    ],
)  # fmt: skip
def test_a_wheel_whose_label_and_content_disagree_is_refused(farm: Server, inside: bytes, sentence: str) -> None:
    answer = farm.upload(*variant_wheel("bad_pkg", "cu130_sm90", inside=inside))
    assert answer.status_code == 400
    assert sentence in answer.text
    assert farm.filenames("bad-pkg") == []


def test_a_label_needs_its_file_and_the_file_its_label(farm: Server) -> None:
    filename, content = plain_wheel("half_pkg")
    answer = farm.upload(filename.replace(".whl", "-null.whl"), content)
    assert answer.status_code == 400
    assert "has a variant label in the file name, but contains no" in answer.text
    filename, content = variant_wheel("half_pkg", "null")
    answer = farm.upload(filename.replace("-null.whl", ".whl"), content)
    assert answer.status_code == 400
    assert "the file name has no variant label" in answer.text


def test_one_label_has_one_meaning_in_a_release(farm: Server) -> None:
    assert farm.upload(*variant_wheel("mean_pkg", "cu130_sm90", tags="cp311-none-any")).status_code == 200
    answer = farm.upload(*variant_wheel("mean_pkg", "cu130_sm90", inside=sm80(), tags="cp312-none-any"))
    assert answer.status_code == 400
    assert "two wheels have the label 'cu130_sm90', but different properties" in answer.text
    assert farm.upload(*variant_wheel("mean_pkg", "cu130_sm90", "2.0", inside=sm80())).status_code == 200
    other = metadata("cu130_sm100", providers={})
    answer = farm.upload(*variant_wheel("mean_pkg", "cu130_sm100", inside=other))
    assert answer.status_code == 400
    assert "different priorities or providers" in answer.text


def test_null_wheels_agree_with_each_other_too(farm: Server) -> None:
    """Else an inconsistent wheel could not be removed, and wheels of a staged set could not be added."""
    nulls = [variant_wheel("null_pkg", "null", inside=metadata("null", providers={"nvidia": {}}), tags="cp310-none-any")]
    nulls.append(variant_wheel("null_pkg", "null", tags="cp311-none-any"))
    assert farm.upload(*nulls[0]).status_code == 200
    for other in (nulls[1], variant_wheel("null_pkg", "cu130_sm90")):
        answer = farm.upload(*other)
        assert answer.status_code == 400
        assert "different priorities or providers" in answer.text
    run_index(farm.root, "stage", "create", "null-set")
    answer = farm.upload(*nulls[1], path="/stage/null-set/legacy/")
    assert answer.status_code == 400, "the set's wheels are listed with the others"


def test_wheels_that_were_taken_and_disagree_are_served_and_can_be_deleted(tmp_path: Path) -> None:
    """An earlier version of the index accepted null wheels with other providers."""
    with serving(tmp_path / "root", "--allow-new", "--variants") as server:
        for label, tags in (
            ("cu124_sm90", TAGS),
            ("cu130_sm90", TAGS),
            ("null", "cp310-none-any"),
            ("null", "cp311-none-any"),
        ):
            assert server.upload(*variant_wheel("odd_pkg", label, tags=tags)).status_code == 200
    with closing(sqlite3.connect(tmp_path / "root" / "catalogue" / "catalogue.db")) as database, database:
        for end in ("cp310-none-any-null", "cp311-none-any-null", "cu130_sm90"):
            other = "UPDATE file SET variant = replace(variant, 'NvidiaVariantPlugin', ?) WHERE filename LIKE ?"
            assert database.execute(other, (end.replace("-", ""), f"%{end}.whl")).rowcount == 1
    with serving(tmp_path / "root", "--variants") as server:
        assert labels(server, "odd-pkg") == ["cu124_sm90", "null"]
        with closing(sqlite3.connect(tmp_path / "root" / "catalogue" / "catalogue.db")) as database, database:
            assert database.execute("UPDATE file SET lost = 1 WHERE filename LIKE '%sm90.whl'").rowcount == 2
        run_index(tmp_path / "root", "yank", "odd-pkg", "1.0")
        assert labels(server, "odd-pkg") == ["null"]
        run_index(tmp_path / "root", "delete", "odd-pkg", "1.0", "--yes")
        assert server.page("odd-pkg").status_code == 404


@pytest.mark.parametrize(
    ("filename", "label"),
    [
        ("a-1.0-py3-none-any.whl", ""),
        ("a-1.0-1-py3-none-any.whl", ""),
        ("a-1.0-py3-none-any-cu130_sm90.whl", "cu130_sm90"),
        ("a-1.0-1x-py3-none-any-null.whl", "null"),
        ("a-1.0+cu130-cp311-cp311-manylinux_2_34_aarch64-torch2.11.whl", "torch2.11"),
    ],
)
def test_the_label_of_a_name(filename: str, label: str) -> None:
    distribution = parse_filename(filename)
    assert (distribution.variant, distribution.version.partition("+")[0]) == (label, "1.0")


@pytest.mark.parametrize("end", ["CU", "a+b", "a!b", ""])
def test_a_name_with_a_wrong_label_is_refused(farm: Server, end: str) -> None:
    filename, content = variant_wheel("name_pkg", "null")
    answer = farm.upload(filename.replace("-null.whl", f"-{end}.whl"), content)
    assert answer.status_code == 400
    assert filename not in farm.filenames("name-pkg")


def test_each_json_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of three releases, and an export with four views in two formats."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for version in ("1.0+cu130", "1.0+cu130.torch2.10", "1.0+cu130.torch2.11"):
        filename, content = variant_wheel("once_pkg", "cu130_sm90", version)
        (folder / filename).write_bytes(content)
    rendered: list[int] = []
    combine = variants.combine

    def count(wheels: Iterable[Variant]) -> bytes:
        known = list(wheels)
        rendered.append(len(known))
        return combine(known)

    monkeypatch.setattr(variants, "combine", count)
    run_index(tmp_path / "root", "import", str(folder), "--variants")
    run_index(tmp_path / "root", "export", str(tmp_path / "out"))
    assert rendered == [1, 1, 1]
    assert len(list((tmp_path / "out").glob("files/*/once_pkg-*-variants.json"))) == 3


def test_the_projects_page_shows_variants(filled: Server) -> None:
    """The label is visible, beside the link; the file name in the address of the link also contains it."""
    page = filled.client.get("/project/choice-pkg/").text
    assert sorted(re.findall(r'</a> <span class="tag">([^<]+)</span>', page)) == sorted(VARIANTS)
