"""What the workflows promise of a night: what it had is kept, what it made is in its artifacts, a set can be published."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from builder.cli.matrix import Part, cells_of
from builder.fetch.git import repository_path
from builder.fetch.store import store_path
from builder.planning import matrix, recipe
from builder.planning.settings import load
from builder.proof import record
from builder.toolchains import ccache, device_store
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yml"))}
JOBS = {(name, key): job for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()}
PINNED = WORKFLOWS["pinned"]["jobs"]
CACHED = [key for key, job in JOBS.items() if any("actions/cache" in step.get("uses", "") for step in job["steps"])]
ALWAYS = ["always()", "${{ always() }}"]


def uses(job: dict[str, Any], action: str) -> list[tuple[int, dict[str, Any]]]:
    """Steps of an action, whatever its version, with their places."""
    return [(at, step) for at, step in enumerate(job["steps"]) if step.get("uses", "").split("@")[0] == action]


def runs(job: dict[str, Any]) -> str:
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_the_nights_that_build_have_a_cache() -> None:
    assert set(CACHED) >= {("pinned", "build"), ("nightly", "build")}


def test_the_night_publishes_without_a_stored_token() -> None:
    """The index exchanges the job's identity for a short token (docs/howto/index-trust.md)."""
    assert JOBS["nightly", "build"]["permissions"]["id-token"] == "write"
    assert "secrets." not in (FOLDER / "nightly.yml").read_text()


@pytest.mark.parametrize("key", CACHED, ids="-".join)
def test_a_cache_is_saved_after_a_failure_too(key: tuple[str, str]) -> None:
    """actions/cache saves only after a success, but a night that was cut off has hours to lose."""
    job = JOBS[key]
    assert uses(job, "actions/cache") == []
    ((before, restore),) = uses(job, "actions/cache/restore")
    ((after, save),) = uses(job, "actions/cache/save")
    (build,) = [at for at, step in enumerate(job["steps"]) if "builder build" in step.get("run", "")]
    assert before < build < after
    assert save["if"] in ALWAYS
    assert save["with"]["path"] == restore["with"]["path"], "another list of paths is another cache"
    # A key that is there already is not written again; the lock changes what hashFiles would say.
    assert save["with"]["key"] == f"${{{{ steps.{restore['id']}.outputs.cache-primary-key }}}}"
    assert {"github.run_id", "github.run_attempt"} <= set(re.findall(r"github\.\w+", restore["with"]["key"]))
    assert restore["with"]["key"].startswith(restore["with"]["restore-keys"].strip())
    # The job's own end would take the step that saves with it.
    assert job["steps"][build]["timeout-minutes"] + 20 <= job["timeout-minutes"]


@pytest.mark.parametrize("key", CACHED, ids="-".join)
def test_what_is_cached_is_where_the_builder_has_it(key: tuple[str, str], tmp_path: Path) -> None:
    """Objects, and the records from which the next night learns memory, the long pole, and what is built already."""
    settings = load().model_copy(update={"home": tmp_path})
    whole = WORKFLOWS[key[0]] | JOBS[key]
    given = whole.get("env", {}).get("GRACEFARM_HOME")
    home = given.rpartition("/")[2] if given else "~/.cache/gracefarm"
    ((_, restore),) = uses(JOBS[key], "actions/cache/restore")
    paths = restore["with"]["path"].split()
    wanted = [ccache.folder(settings, "triton"), device_store.folder(settings, "triton")]
    wanted += [record.path(settings, "1234"), record.folder(settings, "1234") / "dist"]
    if key[0] == "pinned":
        wanted += [store_path(settings, "ab" * 32), repository_path(settings, "cd" * 20)]
    for place in wanted:
        inside = PurePosixPath(home) / place.relative_to(tmp_path)
        assert any(folder.match(path) for path in paths for folder in (inside, *inside.parents)), inside


def test_every_action_is_pinned_by_its_commit() -> None:
    """A tag can be moved to other code; the tag of the commit stands behind it, for people and for what proposes updates."""
    for path in sorted(FOLDER.glob("*.yml")):
        used = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text(), flags=re.MULTILINE)
        assert used
        assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []


def test_the_nights_jobs_build_each_cell_of_the_default_matrix_once() -> None:
    job = JOBS["nightly", "build"]
    (command,) = [step["run"] for step in job["steps"] if "builder build" in step.get("run", "")]
    assert {"--changed", "--matrix", "default", "--only", '"target=$TARGET"', "--shard", '"$SHARD"'} <= set(command.split())
    machines, settings = job["strategy"]["matrix"], load().model_copy(update={"project": REPOSITORY})
    count = len(machines["shard"])
    assert job["env"]["SHARD"] == f"${{{{ matrix.shard }}}}/{count}"
    # A cross build would take minutes for what is seconds on a machine of the target.
    assert [(entry["runner"].endswith("-arm"), entry["target"]) for entry in machines["include"]] == [
        (True, "aarch64"),
        (False, "x86_64"),
    ]
    selector = matrix.named("default", REPOSITORY)
    parts = [
        cell
        for entry in machines["include"]
        for shard in machines["shard"]
        for cell in cells_of(selector, (), settings, Part(only=f"target={entry['target']}", shard=f"{shard}/{count}"))
    ]
    whole = cells_of(selector, (), settings, Part())
    assert len(parts) == len(whole)
    assert set(parts) == set(whole)


def test_what_is_wanted_is_on_the_board_before_it_is_built() -> None:
    """The index shows a record in place of a cell that was not tried."""
    job = JOBS["nightly", "cells"]
    assert JOBS["nightly", "build"]["needs"] == "cells"
    assert "builder matrix" in runs(job)
    assert '--publish "$PUBLISH_URL"' in runs(job)
    assert '--as "nightly-$TARGET"' in runs(job), "a later matrix of a name replaces the earlier one"


UPLOADS = [(key, step) for key, job in JOBS.items() for _, step in uses(job, "actions/upload-artifact")]


@pytest.mark.parametrize(("key", "step"), UPLOADS, ids=["-".join(key) for key, _ in UPLOADS])
def test_an_artifact_has_its_hidden_files_and_can_be_made_again(key: tuple[str, str], step: dict[str, Any]) -> None:
    """.farm is hidden, and since v4.4 hidden files are left out unless the step asks for them."""
    if any(part.startswith(".") for path in step["with"]["path"].split() for part in path.split("/")):
        assert step["with"]["include-hidden-files"] is True
    assert step["with"]["overwrite"] is True, "a job that is run again finds its artifact there"
    assert step["if"] in ALWAYS


def test_the_set_alone_is_published_by_a_job_of_its_own_that_can_be_run_again() -> None:
    publish = PINNED["publish"]
    assert [name for name, job in PINNED.items() if "--stage" in runs(job) or "--publish" in runs(job)] == ["publish"]
    assert publish["needs"] == "set"
    assert "builder build" not in runs(publish)
    # A night has no inputs.
    assert publish["if"] == "inputs.index != '' || vars.INDEX_URL != ''"
    (step,) = [step for step in publish["steps"] if "--stage" in step.get("run", "")]
    assert step["env"]["STAGE_AT"] == "${{ inputs.index || vars.INDEX_URL }}"
    assert "schedule" in WORKFLOWS["pinned"][True], "YAML 1.1 takes `on` for a truth"


def test_the_stages_name_says_what_is_in_it(tmp_path: Path) -> None:
    """The step's own shell, up to the upload: another set gets another name, the same one the same."""
    (step,) = [step for step in PINNED["publish"]["steps"] if "--stage" in step.get("run", "")]
    line = step["run"].splitlines()[0].replace(".venv/bin/python", sys.executable)
    assert line.startswith("id=$(")
    done = subprocess.run(
        ["bash", "-euc", f'{line}\necho "$id"'],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "GRACEFARM_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert re.fullmatch(r"[0-9a-f]{12}\n", done.stdout)


def test_a_published_wheel_says_that_its_digests_were_read_at_first_use() -> None:
    """`builder lock` leaves no mark in the file, so the plan, the record and the SBOM would show the digest as a known one."""
    publishing = {name for (name, _), job in JOBS.items() if {"--stage", "--publish"} & set(runs(job).split())}
    assert publishing >= {"pinned", "nightly"}
    for (name, key), job in JOBS.items():
        builds = [line.split() for line in runs(job).splitlines() if "builder build" in line]
        assert name not in publishing or "builder lock" not in runs(job), (name, key)
        assert name != "pinned" or all({"--accept-new", "--yes"} <= set(words) for words in builds), (name, key)
    # The day is part of the build id, so a later night takes it from the cache.
    lines = runs(PINNED["build"]).splitlines()
    (applied,) = [at for at, line in enumerate(lines) if "git apply accepted.patch" in line]
    (built,) = [at for at, line in enumerate(lines) if "builder build" in line]
    (kept,) = [at for at, line in enumerate(lines) if line.endswith("| tee accepted.patch")]
    assert applied < built < kept
    assert [step["if"] for step in PINNED["build"]["steps"] if "tee accepted.patch" in step.get("run", "")] == ["always()"]
    ((_, restore),) = uses(PINNED["build"], "actions/cache/restore")
    assert "accepted.patch" in restore["with"]["path"].split()


def test_the_pinned_jobs_use_toolchains_that_the_recipes_do_not_refuse() -> None:
    for name, toolchain in (("build", "sandbox"), ("container", "container")):
        for key in PINNED[name]["strategy"]["matrix"]["recipe"]:
            assert toolchain not in recipe.load(REPOSITORY / "recipes", key).data.refuses


@pytest.mark.parametrize("key", JOBS, ids="-".join)
def test_each_step_is_a_script_that_a_shell_reads(key: tuple[str, str]) -> None:
    script = re.sub(r"\$\{\{.*?\}\}", "triton", runs(JOBS[key]))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)


def gathered(tmp_path: Path, day_of: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """.ci/gather on three jobs that filled the gaps of triton and of the stack; `day_of`: when each accepted the stack's."""
    files = {key: f"recipes/{key}/recipe.toml" for key in ("triton", "flash_attn", "aphrodite")}
    stack = "stacks/cu124/stack.toml"
    tmp_path.mkdir()
    for name in (*files.values(), stack):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"name = '{name}'\nsha256_unknown = 'why'\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "gaps"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    for key, name in files.items():
        digest = f"sha256 = '{'ab' * 32}'\naccepted = 2026-01-0"
        if key == "triton":
            (tmp_path / name).write_text(f"name = '{name}'\n{digest}1\n")
        else:
            (tmp_path / stack).write_text(f"name = '{stack}'\n{digest}{day_of[key]}\n")
        patch = subprocess.run(["git", "diff"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        subprocess.run(["git", "checkout", "-q", "."], cwd=tmp_path, check=True)
        artifact = tmp_path / "built" / key
        (artifact / ".farm/builds" / key).mkdir(parents=True)
        (artifact / ".farm/builds" / key / "record.json").write_text(key)
        (artifact / "accepted.patch").write_text(patch)
    (tmp_path / "built/gh200-cu124/5e7").mkdir(parents=True)
    (tmp_path / "built/gh200-cu124/5e7/set.json").write_text("tested")
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci/gather", tmp_path / ".ci")
    return subprocess.run([".ci/gather", "built"], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)


def test_gather_puts_what_the_jobs_made_into_one_checkout(tmp_path: Path) -> None:
    """Two jobs that filled the same gap of the stack, and triton's one of its recipe."""
    place = tmp_path / "same"
    done = gathered(place, {"flash_attn": 1, "aphrodite": 1})
    assert done.returncode == 0, done.stderr
    names = sorted(path.read_text() for path in place.glob(".farm/builds/*/record.json"))
    assert names == ["aphrodite", "flash_attn", "triton"]
    assert (place / ".farm/sets/5e7/set.json").read_text() == "tested"
    found = {path.parent.name: "sha256 =" in path.read_text() for path in place.glob("*/*/*.toml")}
    assert found == {"triton": True, "flash_attn": False, "aphrodite": False, "cu124": True}


def test_gather_refuses_digests_of_the_stack_that_two_jobs_accepted_on_different_days(tmp_path: Path) -> None:
    done = gathered(tmp_path / "days", {"flash_attn": 1, "aphrodite": 2})
    assert (done.returncode, "commit accepted.patch of the job of flash_attn" in done.stderr) == (1, True), done.stderr
