"""The flow as a user drives it: real compilers, the real root, emulated where the target is not the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.planning.stack import host_arch
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value
CREDENTIALS = {"TWINE_USERNAME": "a", "TWINE_PASSWORD": "b"}
SLOW_BACKEND = "import time\ntime.sleep(2)\nreturn wheel(wheel_directory)"


def record_of(farm: Farm, name: str) -> dict[str, object]:
    done = farm.run("show", name, "--json")
    assert done.code == 0, done.said
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


def start(farm: Farm, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "builder", *arguments],
        env=projects.environment(farm.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_c_extension_for_aarch64_from_recipe_to_import(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    (farm.settings.project / "recipes" / "tiny_c" / "smoke.py").write_text(
        "import tiny_c\nassert tiny_c.add(2, 3) == 5\nprint('five')\n"
    )
    done = farm.run("build", "tiny_c", "--target", "aarch64")
    assert done.code == 0, done.said
    wheel = Path(done.out.strip())
    assert wheel.name.startswith("tiny_c-1.0-cp311-cp311-manylinux")
    assert wheel.name.endswith("_aarch64.whl")
    found = record_of(farm, "tiny_c")
    verdicts = {verdict["gate"]: verdict["status"] for verdict in found["verdicts"]}  # type: ignore[index,attr-defined]
    assert "failed" not in verdicts.values()
    assert verdicts["symbols"] == verdicts["alignment"] == "passed"
    assert verdicts["cubins"] == "not applicable"
    assert found["smoke"]["script"] == "five\n"  # type: ignore[index]
    for stage in found["stages"]:  # type: ignore[attr-defined]
        assert stage["cpu_s"] is not None, stage["name"]
        assert stage["peak_memory"] > 0, stage["name"]
    again = farm.run("build", "tiny_c", "--target", "aarch64")
    assert again.code == 0
    assert "already built" in again.said


def test_same_recipe_builds_the_same_wheel_in_another_home_and_under_another_umask(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})
    digests = []
    for umask in (0o022, 0o077):
        assert projects.run_builder(["build", "tiny_c", "--target", NATIVE], farm.environment, umask=umask).code == 0
        digests.append(record_of(farm, "tiny_c")["wheel"])
        remove_tree(farm.settings.home / "builds")
    assert digests[0] == digests[1]


def test_cuda_extension_keeps_the_stacks_sm_list_alone(farm: Farm) -> None:
    farm.recipe(
        "tiny_cuda",
        projects.tree("tiny_cuda"),
        name="tiny-cuda",
        stack="cu130",
        build={"cuda": True, "memory_per_job": "1GiB"},
        smoke={"imports": ["tiny_cuda", "tiny_cuda._core"]},
    )
    done = farm.run("build", "tiny_cuda")
    assert done.code == 0, done.said
    found = record_of(farm, "tiny_cuda")
    verdicts = {verdict["gate"]: verdict for verdict in found["verdicts"]}  # type: ignore[index,attr-defined]
    assert verdicts["cubins"]["status"] == "passed"
    assert verdicts["symbols"]["status"] == "passed"
    log = farm.run("log", "tiny_cuda").out
    assert "core.cu: dropped sm_75 sm_80 sm_86 sm_100, compiles for sm_90\n" in log


KILL_AT = {
    "while fetching": ("plan", "build id"),
    "while the root is made ready": ("fetch", "in the store"),
    "while compiling": ("compile", "jobs"),
    "after compiling": ("compile", ".whl in"),
    "while auditing": ("audit", "wheel:"),
    "while smoke-testing": ("audit", "symbols:"),
    "before the record": ("smoke", "imported"),
}
"Moments of a build, each named by the line that it has just printed."


def kill_at(farm: Farm, step: str, text: str) -> None:
    """Start a build and kill it with SIGKILL when it has said this."""
    running = start(farm, "build", "tiny", "--target", NATIVE, "--json")
    assert running.stdout is not None
    for line in running.stdout:
        event = json.loads(line)
        if event.get("step") == step and text in event["text"]:
            break
    else:
        pytest.fail(f"never said {text!r}: {running.communicate()}")
    running.kill()
    running.communicate(timeout=30)
    assert running.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", KILL_AT)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_record(farm: Farm, moment: str) -> None:
    farm.recipe("tiny", projects.backend(SLOW_BACKEND if moment == "while compiling" else "return wheel(wheel_directory)"))
    kill_at(farm, *KILL_AT[moment])
    assert "Traceback" not in farm.run("list").err
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 0, done.said
    resumed = record_of(farm, "tiny")
    if moment in ("while auditing", "while smoke-testing", "before the record"):
        # Under load the record may be written before the kill arrives.
        late = moment == "before the record" and "already built" in done.said
        assert late or "an interrupted run had finished its compile; continuing after it" in done.said
    remove_tree(farm.settings.home / "builds")
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    whole = record_of(farm, "tiny")
    for part in ("build_id", "inputs", "outcome", "wheel", "verdicts", "smoke"):
        assert resumed[part] == whole[part]
    assert [stage["name"] for stage in resumed["stages"]] == [stage["name"] for stage in whole["stages"]]  # type: ignore[attr-defined]


def test_two_builders_of_one_id_build_once(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(SLOW_BACKEND))
    first, second = (start(farm, "build", "tiny", "--target", NATIVE) for _ in range(2))
    said = [" ".join("".join(process.communicate(timeout=120)).split()) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert sum("waiting for another process" in output for output in said) == 1
    assert sum("already built" in output for output in said) == 1


def test_interrupt_leaves_nothing_running(farm: Farm) -> None:
    mark = f"marker-{os.getpid()}-{time.time_ns()}"
    farm.recipe("tiny", projects.backend(f"subprocess.run(['/bin/sh', '-c', ': {mark}; sleep 100'])"))
    running = start(farm, "build", "tiny", "--target", NATIVE)
    deadline = time.monotonic() + 60
    while not alive(mark):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted" in err
    assert not alive(mark)


def alive(mark: str) -> bool:
    """A process inside the sandbox (its shell, which has the mark in its command line) lives."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if mark.encode() in words and words.startswith(b"/bin/sh"):
            return True
    return False


def shell(farm: Farm, said: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder", "shell", "tiny"],
        env=projects.environment(farm.environment),
        input=said,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_failed_build_leaves_a_record_a_log_and_a_sandbox_to_look_around_in(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("open('/build/tmp/mark', 'w')\nraise RuntimeError('on purpose')"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 21
    shown = farm.run("show", "tiny")
    assert "RuntimeError: on purpose" in shown.out
    log = farm.run("log", "tiny").out
    assert "on purpose" in log
    assert "# bwrap --new-session --unshare-all" in log
    inside = shell(farm, "ls /build/source /build/tmp; touch /usr/x; exit 7\n")
    assert inside.returncode == 7, inside.stderr
    assert "backend.py" in inside.stdout
    assert "mark" in inside.stdout
    assert "Read-only file system" in inside.stderr

    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    edited = shell(farm, "ls /build/tmp\n")
    assert edited.returncode == 0, edited.stderr
    assert "mark" in edited.stdout, "still the last build's"
    assert "changed since that build" in edited.stderr


def test_a_success_has_a_sandbox_to_look_around_in_too(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    inside = shell(farm, "ls /build/source; /env/bin/python3 -m build --version; touch /build/tmp/mine; exit 7\n")
    assert inside.returncode == 7, inside.stderr
    assert "backend.py" in inside.stdout
    assert "build 1." in inside.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_was_cut_off_is_the_last_one(farm: Farm, number: signal.Signals) -> None:
    farm.recipe("tiny", projects.backend("print('the first')\nreturn wheel(wheel_directory)"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 0
    farm.recipe("tiny", projects.backend("print('the second', flush=True)\nimport time\ntime.sleep(100)"))
    running = start(farm, "build", "tiny", "--target", NATIVE)
    deadline = time.monotonic() + 240
    while "the second" not in farm.run("log", "tiny").out:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
    running.send_signal(number)
    running.communicate(timeout=30)
    shown = record_of(farm, "tiny")
    assert shown["outcome"] == "failed"
    assert shown["failure"]["kind"] == "interrupted"  # type: ignore[index]
    assert "the second" in farm.run("log", "tiny").out
    assert "backend.py" in shell(farm, "ls /build/source\n").stdout


def test_a_reader_of_the_log_may_stop_before_its_end(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("raise RuntimeError"))
    assert farm.run("build", "tiny", "--target", NATIVE).code == 21
    with subprocess.Popen(
        [sys.executable, "-m", "builder", "log", "tiny"],
        env=projects.environment(farm.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        reading.stdout.close()
        assert reading.stderr.read() == b""
    assert reading.returncode == -signal.SIGPIPE, "as cat would end, and not with 1, which is a defect of ours"


def test_one_failing_build_does_not_hide_another(farm: Farm) -> None:
    farm.recipe("bad", projects.backend("raise RuntimeError('on purpose')"))
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    done = farm.run("build", "bad", "tiny", "--target", NATIVE)
    assert done.code == 50
    assert "RuntimeError: on purpose" in done.said
    assert "tiny-1.0-py3-none-any.whl" in done.out


def test_changed_builds_only_what_has_no_success_yet(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    assert farm.run("build", "--changed", "--target", NATIVE).code == 0
    done = farm.run("build", "--changed", "--target", NATIVE)
    assert "changed since the last successful build: nothing" in done.said
    unpublished = farm.run("build", "--changed", "--target", NATIVE, "--publish", "http://127.0.0.1:9/legacy/", **CREDENTIALS)
    assert unpublished.code == 40
    assert "changed since the last successful build: tiny" in unpublished.said
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), version="2.0")
    assert "changed since the last successful build: tiny" in farm.run("build", "--changed", "--target", NATIVE).said


def test_a_broken_recipe_ends_neither_the_night_nor_the_list(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    broken = farm.recipe("broken", {}) / "recipe.toml"
    broken.write_text(broken.read_text().replace("license", "licence"))
    listed = farm.run("list")
    assert listed.code == 0, listed.said
    assert "unknown key 'licence'" in listed.out
    assert "tiny" in listed.out
    for command in (["--changed"], ["broken", "tiny"]):
        done = farm.run("build", *command, "--target", NATIVE)
        assert done.code == 50
        assert "unknown key 'licence'" in done.said
        assert "Traceback" not in done.said
    assert farm.run("show", "tiny").code == 0


@pytest.mark.skipif(NATIVE == "aarch64", reason="this host builds only for aarch64")
def test_a_night_passes_over_recipes_without_that_target(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    farm.recipe("arm", projects.backend("return wheel(wheel_directory)"), stack="cu124")
    done = farm.run("build", "--changed", "--target", "x86_64")
    assert done.code == 0, done.said
    assert "skipped: arm: stack cu124 has no target x86_64" in done.said
    assert "tiny-1.0-py3-none-any.whl" in done.out


def test_a_wheel_is_judged_again_when_its_judges_change(farm: Farm) -> None:
    folder = farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    command = ("build", "tiny", "--target", NATIVE)
    assert farm.run(*command).code == 0
    (folder / "smoke.py").write_text("import tiny\nassert tiny.answer == 43, 'another answer'\n")
    changed = ("build", "--changed", "--target", NATIVE, "--publish", "http://127.0.0.1:9/legacy/")
    for again in (command, changed):
        refused = farm.run(*again, **CREDENTIALS)
        assert refused.code == 31, refused.said
        assert "another answer" in refused.said
        assert "jobs (" not in refused.said, "nothing was compiled"
    (folder / "smoke.py").write_text("import tiny\nassert tiny.answer == 42\n")
    assert "checking the wheel again" in farm.run(*command).said
    assert "judged again" not in farm.run(*command).said
    path = folder / "recipe.toml"
    path.write_text(path.read_text() + 'wheel = { max_size = "0.1KiB" }\n')
    refused = farm.run(*command)
    assert refused.code == 30
    assert "more than the limit of 0.1 KiB" in refused.said


def test_json_events_are_lines_that_a_machine_can_read(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    done = farm.run("build", "tiny", "--target", NATIVE, "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert lines[-1]["outcome"] == "built"
    assert Path(lines[-1]["path"]).is_file()
    assert {"plan", "fetch", "compile", "audit", "smoke", "record"} <= {
        line["step"] for line in lines if line.get("event") == "step"
    }


def test_smoke_refuses_a_module_that_is_nowhere(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), smoke={"imports": ["tiny", "absent_module"]})
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 31
    assert "No module named 'absent_module'" in done.said


def test_smoke_refuses_modules_that_the_environment_has_and_the_wheel_lacks(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), smoke={"imports": ["setuptools", "packaging.tags"]})
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 31
    assert "none of the imported modules (setuptools, packaging.tags) is from tiny-1.0-py3-none-any.whl" in done.said
