"""`builder why`: the input that changed, what else stands on it, and the time of the last build."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder.cli import cli
from builder.planning import plan, recipe, stack
from builder.planning.plan import Wanted
from builder.planning.settings import load
from builder.planning.stack import Arch
from builder.proof import judges, record
from builder.proof.record import Record, Stage
from builder.proof.why import Change, changes
from builder.toolchains import choice, kinds
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError, SeveralError, UsageError

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recipes on one stack, both built only as records: no compiler is needed to compare inputs."""
    for name in ("causal_conv1d", "torch_scatter"):
        shutil.copytree(REPOSITORY / "recipes" / name, tmp_path / "recipes" / name)
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    monkeypatch.setenv("GRACEFARM_PROJECT", str(tmp_path))
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path / "home"))
    for name, seconds in (("causal_conv1d", 400.0), ("torch_scatter", 90.0)):
        save(tmp_path, name, seconds)
    return tmp_path


def save(project: Path, name: str, seconds: float) -> Record:
    loaded = recipe.load(project / "recipes", name)
    made = choice.make_plan(loaded, stack.load(project / "stacks", "cu130"), stack.host_arch(), Arch.AARCH64)
    saved = Record(
        build_id=made.build_id,
        recipe=name,
        name=loaded.data.name,
        version=loaded.data.version,
        stack="cu130",
        inputs=json.loads(json.dumps(made.inputs)),
        outcome="built",
        stages=(Stage(name="compile", wall_s=seconds),),
        finished=record.now(),
    )
    record.write(saved, load())
    return saved


def test_of_several_what_took_longest_is_built_first_and_what_nothing_is_known_of_before_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(REPOSITORY / "recipes" / "flash_attn_cu130", project / "recipes" / "flash_attn_cu130")
    begun: list[str] = []

    def begin(one: plan.Plan, *_: object) -> Record:
        begun.append(one.recipe.key)
        raise ConfigError("nothing is built here")

    monkeypatch.setattr("builder.cli.build.build_one", begin)
    names = ["torch_scatter", "causal_conv1d", "flash_attn_cu130"]
    for expected in (names[::-1], ["flash_attn_cu130", "torch_scatter", "causal_conv1d"]):
        begun.clear()
        assert isinstance(CliRunner().invoke(cli, ["build", *names]).exception, SeveralError)
        assert begun == expected
        save(project, "torch_scatter", 500.0)


def edit(project: Path, path: str, old: str, new: str) -> None:
    text = (project / path).read_text()
    assert old in text
    (project / path).write_text(text.replace(old, new, 1))


def why(*arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(cli, ["why", *arguments, "--json"], catch_exceptions=False, standalone_mode=False)
    value = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value.get("result", value)  # type: ignore[no-any-return]


def paths(value: dict[str, object]) -> list[str]:
    found = value["changes"]
    assert isinstance(found, list)
    return [change["path"] for change in found]


def test_nothing_changed(project: Path) -> None:
    value = why("causal_conv1d")
    assert value["changes"] == value["rebuilds"] == []
    assert value["before"] == value["after"]


def test_a_build_in_a_container_is_planned_as_one_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that answers is all that planning asks of it."""
    shutil.copytree(REPOSITORY / "recipes" / "flash_attn", project / "recipes" / "flash_attn")
    engine = tmp_path / "bin" / "podman"
    engine.parent.mkdir()
    engine.write_text("#!/bin/sh\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{engine.parent}:{os.environ['PATH']}")
    loaded, base = recipe.load(project / "recipes", "flash_attn"), stack.load(project / "stacks", "cu124")
    made = choice.make_plan(loaded, base, stack.host_arch(), Arch.AARCH64, ContainerToolchain.find(base, Wanted(), cuda=True))
    last = save(project, "causal_conv1d", 1.0).model_copy(
        update={
            "build_id": made.build_id,
            "recipe": "flash_attn",
            "stack": "cu124",
            "inputs": json.loads(json.dumps(made.inputs)),
            "toolchain": "container",
        }
    )
    record.write(last, load())
    assert why("flash_attn")["changes"] == []
    edit(project, "recipes/flash_attn/recipe.toml", 'NVCC_THREADS = "1"', 'NVCC_THREADS = "2"')
    assert paths(why("flash_attn")) == ["recipe.build.environment.NVCC_THREADS"]


def test_a_change_of_the_recipe_rebuilds_it_alone(project: Path) -> None:
    edit(project, "recipes/causal_conv1d/recipe.toml", '"TRUE"', '"FALSE"')
    value = why("causal_conv1d")
    (path,) = paths(value)
    assert path.startswith("recipe.build.")
    assert value["rebuilds"] == []
    assert value["seconds"] == 400.0


def test_a_change_of_the_stack_names_what_else_it_rebuilds_and_the_time(project: Path) -> None:
    edit(project, "stacks/cu130/stack.toml", 'sm = ["90"]', 'sm = ["90", "100"]')
    value = why("causal_conv1d")
    assert paths(value) == ["stack.sm"]
    rebuilds = value["rebuilds"]
    assert isinstance(rebuilds, list)
    assert [(rebuild["recipe"], rebuild["seconds"]) for rebuild in rebuilds] == [("torch_scatter", 90.0)]


def test_two_ids_by_their_first_digits(project: Path) -> None:
    before = record.latest(load(), "causal_conv1d").build_id
    edit(project, "recipes/causal_conv1d/recipe.toml", 'version = "1.7.0"', 'version = "1.7.1"')
    after = save(project, "causal_conv1d", 500.0).build_id
    value = why("causal_conv1d", before[:12], after[:12])
    assert "recipe.version" in paths(value)
    assert (value["before"], value["after"]) == (before, after)


def test_an_unknown_id_is_told_with_those_that_are_known(project: Path) -> None:
    known = record.latest(load(), "causal_conv1d").build_id
    with pytest.raises(ConfigError, match="starts with") as caught:
        why("causal_conv1d", "zzzz", known)
    assert known[:16] in caught.value.remedy


def test_one_id_is_too_few(project: Path) -> None:
    with pytest.raises(UsageError, match="two build ids"):
        why("causal_conv1d", "abc")


@pytest.mark.parametrize("option", ["--environment", "--cuda"])
def test_an_option_of_the_host_toolchain_is_refused_for_a_build_in_the_sandbox(project: Path, option: str) -> None:
    """`builder why` has no --toolchain, so the remedy does not name it."""
    with pytest.raises(UsageError, match=f"{option} applies only to builds with the host toolchain") as caught:
        why("causal_conv1d", option, str(project))
    assert caught.value.remedy == f"omit {option}"


def test_named_tables_are_compared_by_name_not_by_place() -> None:
    before = {"files": [{"name": "a", "sha256": "1"}, {"name": "b", "sha256": "2"}]}
    after = {"files": [{"name": "b", "sha256": "3"}]}
    assert list(changes(before, after)) == [
        Change(path="files.a", before={"name": "a", "sha256": "1"}, after=None),
        Change(path="files.b.sha256", before="2", after="3"),
    ]


def counts(*arguments: str) -> dict[str, int]:
    found = why("--all", *arguments)["counts"]
    assert isinstance(found, dict)
    return {state: count for state, count in found.items() if count}


def test_all_says_how_many_cells_a_change_of_ours_rebuilds(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The records name no rules: the wheels would be judged by today's.
    assert counts() == {"judged again": 2}
    save(project, "torch_scatter", 100.0)
    assert counts() == {"judged again": 2}, "an earlier build of the same cell is not a separate cell"
    for saved in record.all_of(load()):
        loaded, base = recipe.load(project / "recipes", saved.recipe), stack.load(project / "stacks", "cu130")
        made = choice.make_plan(loaded, base, stack.host_arch(), Arch.AARCH64)
        record.write(saved.model_copy(update={"judged_by": judges.digest(made)}), load())
    assert counts() == {"as they are": 2}

    edit(project, "recipes/torch_scatter/recipe.toml", 'FORCE_ONLY_CUDA = "1"', 'FORCE_ONLY_CUDA = "2"')
    assert counts() == {"rebuilt": 1, "as they are": 1}
    assert counts("causal_conv1d") == {"as they are": 1}

    monkeypatch.setattr("builder.planning.plan.wrappers_digest", lambda: "a change of ours")
    value = why("--all")
    assert value["inputs"] == {"wrappers": 2, "recipe.build.environment.FORCE_ONLY_CUDA": 1}
    assert (value["counts"], value["seconds"]) == ({"rebuilt": 2, "judged again": 0, "blocked": 0, "as they are": 0}, 500.0)
    shutil.rmtree(project / "recipes" / "causal_conv1d")
    assert counts() == {"rebuilt": 1, "blocked": 1}
    done = CliRunner().invoke(cli, ["why", "--all"], catch_exceptions=False, standalone_mode=False)
    assert "blocked   causal_conv1d cu130 root aarch64: unknown recipe 'causal_conv1d'" in " ".join(done.stdout.split("\n"))


@pytest.mark.parametrize(
    ("inputs", "used"),
    [
        ({}, False),
        ({"toolchain": {"kind": "container"}}, False),
        ({"toolchain": {"kind": "host"}}, False),
        ({"toolchain": {"kind": "host", "distributions": {}}}, True),
    ],
)
def test_the_inputs_tell_whether_a_build_used_an_environment_of_the_user(inputs: dict[str, object], used: bool) -> None:
    assert kinds.of_inputs(inputs).used_environment(inputs) is used
