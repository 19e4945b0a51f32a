"""Selectors and the cells that they name."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder.cli import cli
from builder.cli.matrix import Part, cells_of, plan_cell, reports_of, table_of
from builder.compiling.units import DeviceStatistics
from builder.fetch import store_path
from builder.flow.build import CUT_OFF
from builder.flow.costs import Costs
from builder.flow.matrix import document
from builder.planning import matrix, stack
from builder.planning.matrix import Cell, Known, expand, only, parse, parts, shard
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch
from builder.proof import judges, record
from builder.proof.record import Record, Stage
from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import lock
from tests.conftest import REPOSITORY

KNOWN = Known(
    recipes={"conv": "cu130", "flash": "cu124"},
    stacks={name: stack.load(REPOSITORY / "stacks", name).data for name in ("cu124", "cu130")},
    interpreters=["3.10", "3.11", "3.12", "3.13", "3.13-trixie", "3.13t", "3.14", "3.14t"],
)


def test_an_empty_selector_is_every_recipe_as_it_builds_by_itself() -> None:
    assert expand("", KNOWN) == [
        Cell(recipe="conv", stack="cu130", interpreter=None, target=Arch.AARCH64, sm=None),
        Cell(recipe="flash", stack="cu124", interpreter=None, target=Arch.AARCH64, sm=None),
    ]


def test_every_axis() -> None:
    cells = expand("python=3.12..3.14,3.14t,root stack=cu130,cu124 target=aarch64,x86_64 sm=90+100,90a", KNOWN, ["conv"])
    assert len(cells) == 5 * 2 * 2 * 2
    assert len(set(cells)) == len(cells)
    assert {cell.interpreter for cell in cells} == {"3.12", "3.13", "3.14", "3.14t", None}
    assert {cell.sm for cell in cells} == {("90", "100"), ("90a",)}
    assert {cell.recipe for cell in cells} == {"conv"}


def test_a_semicolon_joins_selectors() -> None:
    text = "python=root,3.13; recipe=conv stack=cu124,cu130"
    cells = {(cell.recipe, cell.stack, cell.interpreter) for cell in expand(text, KNOWN)}
    own = {("conv", "cu130", None), ("conv", "cu130", "3.13"), ("flash", "cu124", None), ("flash", "cu124", "3.13")}
    assert cells == own | {("conv", "cu124", None)}
    assert len(expand(text, KNOWN)) == len(cells)
    assert {(cell.recipe, cell.stack, cell.interpreter) for cell in expand(text, KNOWN, ["flash"])} == {
        ("flash", "cu124", None),
        ("flash", "cu124", "3.13"),
    }


def test_a_value_that_is_named_twice_is_one_cell() -> None:
    assert len(expand("stack=cu130,cu130 python=3.12,3.11..3.12 recipe=conv", KNOWN)) == 2


def test_a_range_has_neither_debians_nor_the_free_threaded() -> None:
    pythons = [cell.interpreter for cell in expand("python=3.12..3.14 recipe=conv", KNOWN)]
    assert pythons == ["3.12", "3.13", "3.14"]


@pytest.mark.parametrize(
    ("text", "stacks"),
    [
        ("torch=2.11", {"cu130"}),
        ("torch=2.11.0", {"cu130"}),
        ("torch=2.4..2.11", {"cu124", "cu130"}),
        ("cuda=12.4", {"cu124"}),
        ("cuda=12.4..13.0 torch=2.5..3", {"cu130"}),
        ("stack=cu124,cu130 cuda=13.0", {"cu130"}),
    ],
)
def test_torch_and_cuda_choose_stacks(text: str, stacks: set[str]) -> None:
    assert {cell.stack for cell in expand(text, KNOWN)} == stacks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pyton=3.11", "'pyton=3.11' in the selector is not AXIS=VALUES"),
        ("3.11", "'3.11' in the selector is not AXIS=VALUES"),
        ("python=3.9", "unknown python '3.9'"),
        ("python=3.14..3.99", "unknown python '3.99'"),
        ("python=", "the axis python has no value"),
        ("python=3.11 python=3.12", "the axis python is given twice"),
        ("stack=cu999", "unknown stack 'cu999'"),
        ("target=arm", "unknown target 'arm'"),
        ("recipe=nothing", "unknown recipe 'nothing'"),
        ("sm=90+x", "'x' in '90+x' is not an architecture"),
        ("cuda=new", "cuda=new is neither a version nor a range"),
        ("cuda=11.8", "no stack has cuda 11.8"),
        ("stack=cu124 cuda=13.0", "names no cell"),
    ],
)
def test_bad_selectors_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(text, KNOWN)
    assert words in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("target=arch64", "unknown target 'arch64' in the selector", "did you mean 'aarch64'?"),
        ("target=powerpc", "unknown target 'powerpc' in the selector", "targets: aarch64, x86_64"),
        (
            "python=3.14..3.10",
            "the range python=3.14..3.10 is empty, since its end is lower than its beginning",
            "write python=3.10..3.14",
        ),
        (
            "cuda=13.0..12.4",
            "the range cuda=13.0..12.4 is empty, since its end is lower than its beginning",
            "write cuda=12.4..13.0",
        ),
        ("torch=9", "no stack has torch 9", "the stacks have these versions of torch: 2.4.0, 2.11.0"),
        ("torch=2.11,2.12..2.14", "no stack has torch 2.12..2.14", "the stacks have these versions of torch: 2.4.0, 2.11.0"),
        (
            "python=3.10..3.14t",
            "a range of Pythons must begin and end with a version, but 3.10..3.14t contains 3.14t",
            "write a range such as 3.10..3.14, and append 3.14t after a comma",
        ),
    ],
)
def test_a_bad_value_leads_to_the_right_ones(text: str, cause: str, remedy: str) -> None:
    for call in (lambda: expand(text, KNOWN), lambda: only(expand("", KNOWN), text, KNOWN)):
        with pytest.raises(UsageError) as caught:
            call()
        assert (caught.value.cause, caught.value.remedy) == (cause, remedy)


def test_selectors_by_name(tmp_path: Path) -> None:
    assert matrix.named("python=3.11", tmp_path) == "python=3.11"
    with pytest.raises(UsageError, match="neither a selector nor the name of a selector"):
        matrix.named("default", tmp_path)
    (tmp_path / "matrix.toml").write_text('keep_torch = 2\n[selectors]\ndefault = "python=root"\n')
    assert matrix.named("default", tmp_path) == "python=root"
    assert matrix.read(tmp_path).keep_torch == 2
    (tmp_path / "matrix.toml").write_text('[selectors]\ndefault = "python"\n')
    with pytest.raises(ConfigError, match="AXIS=VALUES"):
        matrix.named("default", tmp_path)


def test_the_projects_own_selectors_are_understood() -> None:
    for selector in matrix.read(REPOSITORY).selectors.values():
        assert all(parse(part) for part in parts(selector))


def test_the_default_cells_have_a_target_and_build_requirements_and_omit_no_recipe(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    targets = {name: stack.load(REPOSITORY / "stacks", name).data.glibc for name in stack.names(REPOSITORY / "stacks")}
    cells = cells_of(matrix.named("default", REPOSITORY), (), settings, Part())
    assert [cell for cell in cells if cell.target not in targets[cell.stack]] == []
    for cell in cells:
        lock = REPOSITORY / "recipes" / cell.recipe / "requirements.lock"
        assert not lock.is_file() or f"Python {cell.interpreter} on {cell.target}:" not in lock.read_text(), cell
    own = cells_of("target=aarch64,x86_64", (), settings, Part())
    assert {cell for cell in own if cell.target in targets[cell.stack]} <= set(cells)


def test_a_blocked_cell_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    cells = [
        Cell(recipe="causal_conv1d", stack="cu132", interpreter="3.13t", target=Arch.AARCH64, sm=("90", "100")),
        Cell(recipe="triton", stack="cu124", interpreter=None, target=Arch.X86_64, sm=None),
    ]
    conv, triton = document("blocked", "", reports_of(cells, settings))["cells"]  # type: ignore[misc]
    known = ("version", "torch", "cuda", "python", "sm", "state")
    assert [conv[name] for name in known] == ["1.7.0", "2.15.0", "13.2", "3.13t", ["90", "100"], "blocked"]
    assert [triton[name] for name in known] == ["3.2.0+git755d4164", "", "", "3.11", [], "blocked"]
    assert conv["reason"] == "stack cu132 does not support Python 3.13t: torch 2.15.0 has no wheel for it"


def test_the_document_names_each_python_as_the_table_does(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    found = reports_of(expand("python=root,3.11,3.13,3.13-trixie", CONV), settings)
    assert [line[10:].split()[2] for line in table_of(found)[:-1]] == ["root", "3.11", "3.13", "3.13-trixie"]
    rows = document("names", "", found)["cells"]
    assert [row["interpreter"] for row in rows] == ["root", "3.11", "3.13", "3.13-trixie"]  # type: ignore[attr-defined]
    assert [row["python"] for row in rows] == ["3.11", "3.11", "3.13", "3.13"]  # type: ignore[attr-defined]


CONV = replace(KNOWN, recipes={"causal_conv1d": "cu130"})


def write_built(cell: Cell, settings: Settings, **values: object) -> None:
    """The record of a successful build of the cell as it is planned now."""
    plan = plan_cell(cell, settings)
    build = Record(
        build_id=plan.build_id,
        recipe=cell.recipe,
        name=plan.recipe.data.name,
        version=plan.recipe.data.version,
        stack=cell.stack,
        interpreter=cell.interpreter,
        inputs=plan.inputs,
        outcome="built",
        finished=f"2026-11-{values.pop('day', 1):02}T00:00:00+00:00",
    )
    record.write(build.model_copy(update=values), settings)


def compiled(cpu_s: float) -> tuple[Stage, ...]:
    return (Stage(name="compile", wall_s=1, cpu_s=cpu_s),)


def costs_of(text: str, settings: Settings) -> Costs:
    (found,) = reports_of(expand(text, CONV), settings)
    assert found.state == "not tried"
    return found.costs


def test_a_cell_that_is_not_built_has_the_costs_of_a_similar_build_without_caches(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    assert costs_of("python=root", settings) == Costs()
    taken = DeviceStatistics(text=3, nvvm=0, ptx=3, misses=0, cpu_s=1, saved_cpu_s=250)
    (there,) = expand("python=root", CONV)
    write_built(there, settings, day=2, stages=compiled(100), device_code=taken, work_bytes=5 << 30)
    (built,) = reports_of([there], settings)
    assert (built.state, built.costs.cpu_seconds, built.costs.estimate) == ("built", 100, "")

    alike = costs_of("python=3.13-trixie", settings)
    assert (alike.cpu_seconds, alike.estimate) == (350, "estimated from a similar build")
    assert 5 << 30 < (alike.disk_bytes or 0) < 6 << 30, "the working folder, and the finished build"
    other = costs_of("target=x86_64 sm=90+100", settings)
    assert (other.cpu_seconds, other.estimate) == (350, "estimated from a build for target aarch64, sm 90")
    assert "350 CPU s, 5,3" in table_of(reports_of(expand("python=3.13-trixie", CONV), settings))[0]

    (older,) = expand("python=3.13", CONV)
    write_built(older, settings, day=1, stages=compiled(400))
    assert costs_of("python=3.13-trixie", settings).cpu_seconds == 400, "the build that used no results of a cache"


def test_a_cell_that_cannot_be_planned_has_estimates_too(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    there = Cell(recipe="causal_conv1d", stack="cu132", interpreter=None, target=Arch.AARCH64, sm=None)
    write_built(there, settings, stages=compiled(100))
    (blocked,) = reports_of([replace(there, interpreter="3.13t")], settings)
    assert (blocked.state, blocked.costs.cpu_seconds) == ("blocked", 100)
    assert blocked.costs.estimate == "estimated from a similar build"


def test_a_cell_that_was_not_tried_names_the_hosts_of_what_is_missing(tmp_path: Path) -> None:
    mirrors = {"https://github.com/astral-sh/": "https://pythons.example/"}
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY, "mirrors": mirrors})

    def reason(python: str) -> str:
        (found,) = reports_of(expand(f"python={python}", CONV), settings)
        assert found.state == "not tried"
        return found.reason

    assert reason("root") == "fetches files from: the Python index"
    assert reason("3.13") == "fetches files from: pythons.example, the Python index"
    assert reason("3.14t") == "fetches files from: pythons.example, the Python index"
    assert reason("3.13-trixie") == "fetches files from: the Debian archive, the Python index"
    for path in (REPOSITORY / "interpreters" / "3.13").glob("interpreter.toml"):
        for sha256 in re.findall(r'^sha256 = "(\w+)"', path.read_text(), flags=re.MULTILINE):
            store_path(settings, sha256).parent.mkdir(parents=True)
            store_path(settings, sha256).touch()
    assert reason("3.13") == "fetches files from: the Python index"


def test_a_running_build_is_not_a_failed_one(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path, "project": REPOSITORY})
    (cell,) = expand("python=root", CONV)
    write_built(cell, settings, outcome="failed", failure=CUT_OFF)

    def state() -> tuple[str, str]:
        (found,) = reports_of([cell], settings)
        return found.state, found.reason

    with lock(record.lock_path(settings, plan_cell(cell, settings).build_id)):
        assert state() == ("running", "")
    assert state() == ("failed", "the build was interrupted; a new build continues it")


def test_a_part_of_the_cells_is_chosen_by_axes() -> None:
    cells = expand("python=root,3.13 target=aarch64,x86_64 sm=90,100", KNOWN)
    assert {(cell.recipe, cell.stack) for cell in only(cells, "torch=2.4", KNOWN)} == {("flash", "cu124")}
    assert {cell.interpreter for cell in only(cells, "python=root", KNOWN)} == {None}
    assert {cell.target for cell in only(cells, "recipe=conv target=x86_64", KNOWN)} == {Arch.X86_64}
    assert len(only(cells, "sm=100", KNOWN)) == len(cells) // 2
    for text, sentence in (
        ("stack=cu12", "unknown stack"),
        ("sm=120", "matches none of the cells that --matrix selects"),
        ("place=here", "not AXIS=VALUES"),
    ):
        with pytest.raises(UsageError, match=sentence):
            only(cells, text, KNOWN)


def test_shards_have_each_cell_once_and_keep_those_together_that_share_objects() -> None:
    cells = expand("python=root,3.13 stack=cu124,cu130 target=aarch64,x86_64", KNOWN)
    parts = [shard(cells, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(map(str, itertools.chain(*parts))) == sorted(map(str, cells))
    owners = {(cell.recipe, cell.stack): number for number, part in enumerate(parts) for cell in part}
    assert all(owners[cell.recipe, cell.stack] == number for number, part in enumerate(parts) for cell in part)
    assert len(set(owners.values())) == 3
    assert shard(cells[:1], "2/2") == []
    for text in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match="is not of the form I/N"):
            shard(cells, text)


def test_a_part_without_a_cell_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More jobs than there is to share among them: the last must not take everything."""
    monkeypatch.setenv("GRACEFARM_PROJECT", str(REPOSITORY))
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path))
    part = ["--matrix", "recipe=causal_conv1d", "--shard", "2/2"]
    for words in (["build", "--changed", *part], ["matrix", *part]):
        done = CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        assert done.exit_code == 0
        assert "nothing" in done.output or "no cells" in done.output
    assert not (tmp_path / "builds").exists()


def test_an_empty_url_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in nightly.yml without the variable PUBLISH_URL."""
    monkeypatch.setenv("GRACEFARM_PROJECT", str(REPOSITORY))
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path))
    (cell,) = expand("python=root", CONV)
    plan = plan_cell(cell, load())
    wheel = record.folder(load(), plan.build_id) / "dist" / "causal_conv1d-1.7.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    write_built(cell, load(), wheel=record.product(wheel), judged_by=judges.digest(plan))
    command = ["build", "--changed", "--matrix", "recipe=causal_conv1d"]
    for words in (command, [*command, "--publish", ""]):
        done = CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        assert "changed since the last successful build: nothing" in done.output


def test_prune_lists_builds_of_old_torches_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, home = tmp_path / "project", tmp_path / "home"
    for name in ("recipes", "stacks", "interpreters"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).symlink_to(REPOSITORY / name)
    monkeypatch.setenv("GRACEFARM_PROJECT", str(project))
    monkeypatch.setenv("GRACEFARM_HOME", str(home))
    settings = load()

    def listed(*words: str) -> str:
        return CliRunner().invoke(cli, ["matrix", "--prune", *words], catch_exceptions=False, standalone_mode=False).output

    (project / "matrix.toml").write_text("keep_torch = 1\n")
    assert listed() == "no builds for old releases of torch\n"
    pairs = (("causal_conv1d", "cu132"), ("causal_conv1d", "cu130"), ("torch_scatter", "cu130"), ("triton", "cu124"))
    for name, on in pairs:
        for python in (None, "3.13-trixie") if on == "cu130" else (None,):
            cell = Cell(recipe=name, stack=on, interpreter=python, target=Arch.AARCH64, sm=None)
            write_built(cell, settings, stages=compiled(1))
    rows = [line.split()[:6] for line in listed().splitlines()]
    assert sorted(rows) == [
        [name, "cu130", "torch", "2.11.0", python, "aarch64"]
        for name in ("causal_conv1d", "torch_scatter")
        for python in ("3.13-trixie", "root")
    ], "triton does not use torch, and 2.15.0 is the newest"
    assert {line.split()[0] for line in listed("torch_scatter").splitlines()} == {"torch_scatter"}
    for words in (("--matrix", "python=root"), ("--only", "python=root"), ("--shard", "1/2"), ("--publish", "http://host/")):
        with pytest.raises(UsageError, match=f"--prune and {words[0]} cannot be used together"):
            listed(*words)
    (project / "matrix.toml").write_text("keep_torch = 3\n")
    assert listed() == "no builds for old releases of torch\n"
