"""Records of builds: the facts that they give to wheels, and who may write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from index_kit import AARCH64, Server, make_token, preview_of, run_index, wheel


def test_the_farms_record_inside_a_wheel_gives_its_facts(shared: Server) -> None:
    inside = {"build_id": "b1", "stack": {"name": "cu130", "cuda": "13.0", "torch": "2.11.0", "sm": ["90"], "glibc": "2.35"}}
    folder = "fact_pkg-1.0.dist-info"
    answer = shared.upload(*wheel("fact_pkg", "1.0", AARCH64, files={f"{folder}/gracefarm.json": json.dumps(inside).encode()}))
    assert answer.status_code == 200
    item = shared.page("fact-pkg").json()["files"][0]
    assert (item["_cuda"], item["_torch"], item["_sm"], item["_glibc"]) == ("13.0", "2.11.0", ["90"], "2.34"), (
        "the tag is measured, the stack is an upper bound"
    )
    assert shared.filenames("fact-pkg", prefix="/cu130")
    assert shared.client.get("/simple/fact-pkg/" + item["_record"]).json() == inside


def test_a_record_that_comes_later_gives_facts_too(shared: Server) -> None:
    name, content = wheel("later_pkg", "1.0", AARCH64)
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("later-pkg", prefix="/cu126") == []
    record = {
        "id": "later-1",
        "recipe": "later_cu126",
        "name": "later-pkg",
        "outcome": "published",
        "facts": {"cuda": "12.6", "sm": ["90", "90a"]},
        "outputs": {"sha256": hashlib.sha256(content).hexdigest()},
    }
    auth = ("__token__", shared.token)
    assert shared.client.put("/records/later-1", json=record).status_code == 401
    assert shared.client.put("/records/later-1", json=record, auth=auth).status_code == 200
    assert shared.client.put("/records/later-1/log", content=b"the log\n", auth=auth).status_code == 200
    assert shared.filenames("later-pkg", prefix="/cu126") == [name]
    item = shared.page("later-pkg").json()["files"][0]
    assert item["_sm"] == ["90", "90a"]
    assert shared.client.get("/simple/later-pkg/" + item["_record"]).json() == record
    assert shared.client.get("/simple/later-pkg/" + item["_record"] + "/log").text == "the log\n"


def test_records_of_failed_builds_are_kept(shared: Server) -> None:
    auth = ("__token__", shared.token)
    record = {
        "id": "failed-1",
        "recipe": "broken",
        "stack": "cu130",
        "outcome": "failed",
        "cause": "nvcc: out of memory",
        "seconds": 61.5,
    }
    assert shared.client.put("/records/failed-1", json=record, auth=auth).status_code == 200
    assert shared.client.get("/records/failed-1").json() == record
    for identifier, body in (("failed-1", b"not json"), ("other", json.dumps(record).encode()), ("failed-1", b"[]")):
        assert shared.client.put(f"/records/{identifier}", content=body, auth=auth).status_code in (400, 404), identifier
    assert shared.client.get("/records/none").status_code == 404


def test_a_token_for_a_project_puts_no_other_projects_record(shared: Server) -> None:
    token = make_token(shared.root, "--project", "mine-pkg")
    auth = ("__token__", token)
    assert shared.client.put("/records/mine-1", json={"recipe": "mine_pkg"}, auth=auth).status_code == 200
    assert shared.client.put("/records/mine-1/log", content=b"log", auth=auth).status_code == 200
    assert (
        shared.client.put("/records/theirs-1", json={"recipe": "theirs"}, auth=("__token__", shared.token)).status_code == 200
    )
    for path, content in (("theirs-1", b'{"recipe": "mine_pkg"}'), ("theirs-1/log", b"x"), ("new-1", b'{"recipe": "theirs"}')):
        assert shared.client.put(f"/records/{path}", content=content, auth=auth).status_code == 403, path


def record_of(name: str, content: bytes, **more: object) -> dict[str, object]:
    return {"recipe": name, "outcome": "built", "wheel": {"sha256": hashlib.sha256(content).hexdigest()}, **more}


def test_a_record_moves_no_other_projects_wheel(shared: Server) -> None:
    """A token for one project names a wheel of another project, whose facts, view and page do not change."""
    name, content = wheel("victim_pkg", "1.0+cu130", AARCH64)
    assert shared.upload(name, content).status_code == 200
    mine = ("__token__", make_token(shared.root, "--project", "mine-p"))
    stolen = record_of("mine-p", content, facts={"cuda": "11.8"})
    assert shared.client.put("/records/stolen-1", json=stolen, auth=mine).status_code == 200
    assert shared.filenames("victim-pkg", prefix="/cu130") == [name]
    assert shared.filenames("victim-pkg", prefix="/cu118") == []
    assert "_record" not in shared.page("victim-pkg").json()["files"][0]


def test_a_wheel_that_names_a_foreign_build_is_not_of_it(shared: Server) -> None:
    auth = ("__token__", shared.token)
    real = wheel("real_pkg", "1.0", files={"real_pkg-1.0.dist-info/gracefarm.json": b'{"build_id": "real-1"}'})
    assert shared.upload(*real).status_code == 200
    gates = {"verdicts": [{"gate": "smoke", "status": "passed", "summary": "proven on a GPU"}]}
    assert shared.client.put("/records/real-1", json=record_of("real-pkg", real[1], **gates), auth=auth).status_code == 200
    for name in ("other_pkg", "real_pkg"):
        version = "1.0" if name == "other_pkg" else "2.0"
        inside = {f"{name}-{version}.dist-info/gracefarm.json": b'{"build_id": "real-1"}'}
        fake = wheel(name, version, files=inside)
        assert shared.upload(*fake).status_code == 200
        assert "proven on a GPU" not in shared.client.get(f"/wheel/{fake[0]}/").text
    assert "proven on a GPU" in shared.client.get(f"/wheel/{real[0]}/").text


def test_a_record_that_names_its_wheel_lets_no_other_be_of_its_build(shared: Server) -> None:
    """The forged wheel comes first; the record that follows names another wheel."""
    auth = ("__token__", shared.token)
    inside = {"early_pkg-2.0.dist-info/gracefarm.json": b'{"build_id": "early-1"}'}
    fake, real = wheel("early_pkg", "2.0", files=inside), wheel("early_pkg", "1.0")
    for item in (fake, real):
        assert shared.upload(*item).status_code == 200
    gates = {"verdicts": [{"gate": "smoke", "status": "passed", "summary": "proven on a GPU"}]}
    assert shared.client.put("/records/early-1", json=record_of("early-pkg", real[1], **gates), auth=auth).status_code == 200
    assert "proven on a GPU" in shared.client.get(f"/wheel/{real[0]}/").text
    assert "proven on a GPU" not in shared.client.get(f"/wheel/{fake[0]}/").text


def test_a_token_for_a_set_puts_records_of_its_wheels_alone(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "record-set")
    token = make_token(shared.root, "--set", "record-set")
    auth = ("__token__", token)
    member, outside = wheel("member_pkg"), wheel("outside_pkg", "1.0+cu130", AARCH64)
    assert shared.upload(*member, path="/stage/record-set/legacy/", token=token).status_code == 200
    assert shared.upload(*outside).status_code == 200
    good = record_of("member-pkg", member[1], facts={"sm": ["90"]})
    assert shared.client.put("/records/member-1", json=good, auth=auth).status_code == 200
    assert shared.client.put("/records/member-1/log", content=b"log", auth=auth).status_code == 200
    bad = record_of("outside-pkg", outside[1], facts={"cuda": "11.8"})
    for path, body in (("outside-1", json.dumps(bad).encode()), ("failed-2", b'{"recipe": "x"}'), ("outside-1/log", b"x")):
        assert shared.client.put(f"/records/{path}", content=body, auth=auth).status_code == 403, path
    assert shared.filenames("outside-pkg", prefix="/cu130")


def test_a_staged_build_is_as_hidden_as_its_wheel(shared: Server, tmp_path: Path) -> None:
    run_index(shared.root, "stage", "create", "quiet")
    inside = {"quiet_pkg-1.0.dist-info/gracefarm.json": b'{"build_id": "quiet-1", "recipe": "quiet-pkg", "outcome": "built"}'}
    name, content = wheel("quiet_pkg", "1.0", files=inside)
    assert shared.upload(name, content, path="/stage/quiet/legacy/").status_code == 200
    auth = ("__token__", shared.token)
    for path, body in (("", json.dumps(record_of("quiet-pkg", content)).encode()), ("/log", b"log")):
        assert shared.client.put(f"/records/quiet-1{path}", content=body, auth=auth).status_code == 200
    places = ("/records/quiet-1", "/records/quiet-1/log", "/board/quiet-1/")
    run_index(shared.root, "export", str(tmp_path / "before"))
    assert [shared.client.get(place).status_code for place in places] == [404, 404, 404]
    assert "quiet-" not in shared.client.get("/board/").text + shared.client.get("/changes").text
    assert not [path for path in (tmp_path / "before").rglob("*") if "quiet" in path.name]
    preview = preview_of(shared, "quiet")
    item = shared.page("quiet-pkg", prefix=preview).json()["files"][0]
    assert shared.client.get(f"{preview}/simple/quiet-pkg/{item['_record']}").json()["recipe"] == "quiet-pkg"
    assert shared.client.get(f"{preview}/simple/quiet-pkg/{item['_record']}/log").text == "log"
    assert shared.client.get(f"{preview}/records/stolen-1").status_code == 404
    run_index(shared.root, "stage", "publish", "quiet")
    assert [shared.client.get(place).status_code for place in places] == [200, 200, 200]


ODD = {
    "cuda with a path": {"facts": {"cuda": "13.0/x"}},
    "cuda with a patch": {"facts": {"cuda": "13.0.1"}},
    "infinite seconds": {"seconds": float("inf")},
    "seconds of 400 digits": {"seconds": int("9" * 400)},
    "seconds that are true": {"seconds": True},
    "text for a time": {"stages": [{"name": "compile", "wall_s": "long", "peak_memory": "much", "note": ["x"]}]},
    "a list for a verdict": {"verdicts": [{"gate": "x", "status": ["passed"], "summary": {}, "details": 3}]},
    "details that are not text": {"verdicts": [{"gate": "x", "details": [1, None, "told"]}]},
    "odd sm": {"facts": {"sm": ["../x", 90, None, {"a": 1}]}},
    "odd torch": {"facts": {"torch": "2.11/../x"}},
    "numbers for names": {"version": 3, "stack": [1], "inputs": [], "failure": 7, "finished": {}},
}


def put_odd(server: Server, odd: dict[str, object]) -> tuple[str, str]:
    """A wheel, and the record of a failed build with this defect; returns the names of both."""
    tag = hashlib.sha256(repr(odd).encode()).hexdigest()[:8]
    name, content = wheel(f"odd_{tag}", "1.0", AARCH64)
    assert server.upload(name, content).status_code == 200
    record = record_of(f"odd-{tag}", content, **{"outcome": "failed", **odd})
    body = json.dumps(record).replace("Infinity", "1e999")
    auth = ("__token__", server.token)
    assert server.client.put(f"/records/odd-{tag}", content=body.encode(), auth=auth).status_code == 200
    return f"odd-{tag}", name


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_record_breaks_no_page(shared: Server, odd: dict[str, object]) -> None:
    project, name = put_odd(shared, odd)
    for path in ("/", "/board/", f"/board/{project}/", f"/wheel/{name}/", f"/project/{project}/", "/sets/"):
        assert shared.client.get(path).status_code == 200, path
    if odd == ODD["cuda with a patch"]:
        assert shared.filenames(project, prefix="/cu130") == [name], "a patch release belongs to its CUDA version"


def test_odd_records_break_no_export(server: Server, tmp_path: Path) -> None:
    for odd in ODD.values():
        put_odd(server, odd)
    run_index(server.root, "export", str(tmp_path / "static"))
    assert len(list((tmp_path / "static" / "board").iterdir())) > len(ODD)


def test_half_a_surrogate_pair_is_refused(shared: Server) -> None:
    answer = shared.client.put("/records/half-1", content=b'{"recipe": "\\ud800"}', auth=("__token__", shared.token))
    assert answer.status_code == 400
    assert "only one half of a surrogate pair" in answer.text
    whole = b'{"recipe": "\\ud83d\\ude00"}'
    assert shared.client.put("/records/half-2", content=whole, auth=("__token__", shared.token)).status_code == 200
