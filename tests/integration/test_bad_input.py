"""What a user does wrong, or a package does to us: one clear sentence, the documented exit code, never a traceback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from builder.box import binfmt
from builder.cli.options import plan_of
from builder.compiling import jobs
from builder.flow import build
from builder.flow.attempt import BuildOptions
from builder.ground import root
from builder.planning import stack
from builder.planning.settings import load
from builder.planning.stack import Arch, host_arch
from gracefarm.console import Console
from gracefarm.errors import ExitCode, MemoryBoundError
from tests import projects
from tests.conftest import Farm
from tests.integration import fetch_kit

NATIVE = host_arch().value


def refused(done: projects.Done, code: ExitCode, *words: str) -> None:
    """The run ended with this failure class, these words, a remedy, and no traceback."""
    assert done.code == code, done.said
    for word in words:
        assert word in done.said
    assert "Traceback" not in done.err
    assert "remedy:" in done.err


def build_tiny(farm: Farm, *more: str, **variables: str) -> projects.Done:
    return farm.run("build", "tiny", "--target", NATIVE, *more, **variables)


def test_unknown_recipe_names_the_nearest(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    refused(farm.run("build", "tiney"), ExitCode.CONFIG, "unknown recipe 'tiney'", "did you mean 'tiny'?")


def test_unknown_stack_names_the_nearest(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    refused(farm.run("plan", "tiny", "--stack", "cu1300"), ExitCode.CONFIG, "unknown stack 'cu1300'", "did you mean 'cu130'?")


def test_unknown_key_names_file_line_and_the_nearest(farm: Farm) -> None:
    folder = farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    path = folder / "recipe.toml"
    path.write_text(path.read_text() + "\n[wheel]\nmaxsize = '1GiB'\n")
    line = len(path.read_text().splitlines())
    refused(
        farm.run("plan", "tiny"), ExitCode.CONFIG, f"{path}:{line}: unknown key 'wheel.maxsize'", "did you mean 'max_size'?"
    )


def damage(farm: Farm, name: str, old: str, new: str) -> None:
    place = farm.settings.project / name
    assert old in place.read_text()
    place.write_text(place.read_text().replace(old, new, 1))


@pytest.mark.parametrize("name", ["recipes/tiny/recipe.toml", "stacks/bare/stack.toml", "stacks/bare/requirements.lock"])
def test_a_file_that_is_not_utf_8(farm: Farm, name: str) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    place = farm.settings.project / name
    place.write_bytes("# größer\n".encode("latin-1") + place.read_bytes())
    refused(farm.run("plan", "tiny"), ExitCode.CONFIG, f"{place} is not UTF-8", "at byte 4")


def test_one_bad_recipe_does_not_hide_the_others_from_a_list(farm: Farm) -> None:
    for name in ("tiny", "other"):
        farm.recipe(name, projects.backend("return wheel(wheel_directory)"))
    (farm.settings.project / "recipes/tiny/recipe.toml").write_bytes(b"\xff")
    done = farm.run("list")
    assert done.code == 0, done.said
    assert "other 1.0 bare" in done.said
    assert "tiny/recipe.toml is not UTF-8" in done.said


def test_a_lock_that_is_a_folder(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    place = farm.settings.project / "stacks/bare/root.lock"
    place.unlink()
    place.mkdir()
    refused(farm.run("plan", "tiny"), ExitCode.CONFIG, f"cannot read {place}: Is a directory")


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"files": [{"url": "https://[bad/x", "sha256": "0" * 64, "path": "a"}]}, ("'files.0.url'", "Invalid IPv6 URL")),
        ({"files": [{"url": "https://a:b/x", "sha256": "0" * 64, "path": "a"}]}, ("'files.0.url'", "Port could not be cast")),
        (
            {"files": [{"url": "https://a/b c", "sha256": "0" * 64, "path": "a"}]},
            ("'files.0.url'", "must not contain white space"),
        ),
        ({"wheel": {"requires": {"triton": "triton => rubbish"}}}, ("'wheel.requires.triton'", "triton => rubbish")),
        ({"wheel": {"requires": {"triton": "torch==2.4.0"}}}, ("'wheel'", "which names a different package")),
        ({"wheel": {"sm_extra": {"*.cu": ["90x"]}}}, ("'wheel.sm_extra.*.cu.0'",)),
    ],
)
def test_a_value_that_would_fail_hours_later(farm: Farm, tables: dict[str, object], words: tuple[str, ...]) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), **tables)
    refused(farm.run("plan", "tiny"), ExitCode.CONFIG, "tiny/recipe.toml:", *words)


def test_a_glibc_that_is_written_in_another_way(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    damage(farm, "stacks/bare/stack.toml", '"2_34"', '"2.34"')
    refused(farm.run("plan", "tiny"), ExitCode.CONFIG, "bare/stack.toml:", "'glibc.")


@pytest.mark.parametrize("program", ["true", "echo"])
def test_a_python_that_is_none(farm: Farm, program: str) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    done = farm.run("plan", "tiny", "--toolchain", "host", "--python", f"/bin/{program}")
    refused(done, ExitCode.HOST, f"/bin/{program} is not a working Python interpreter")


def test_a_substitution_in_a_file_that_is_not_utf_8(farm: Farm) -> None:
    files = projects.backend("return wheel(wheel_directory)") | {"latin.c": "/* größer */".encode("latin-1")}
    farm.recipe("tiny", files, substitutions=[{"path": "latin.c", "find": "a", "replace": "b"}])
    refused(build_tiny(farm), ExitCode.SOURCE, "latin.c", "not UTF-8")


def test_branch_where_a_commit_belongs(farm: Farm) -> None:
    source = {"kind": "git", "url": "https://example.org/a.git", "commit": "main", "tree": "0" * 40}
    farm.recipe("tiny", {}, source=source)
    refused(farm.run("plan", "tiny"), ExitCode.CONFIG, "'source.commit'")


def test_git_commit_that_does_not_exist(farm: Farm, tmp_path: Path) -> None:
    repository = tmp_path / "upstream"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    farm.recipe("tiny", {}, source={"kind": "git", "url": repository.as_uri(), "commit": "1" * 40, "tree": "2" * 40})
    refused(build_tiny(farm), ExitCode.FETCH, "1" * 40)


def test_wrong_sha256(farm: Farm) -> None:
    # Different bytes: a file that the store has by its digest is not fetched again.
    folder = farm.recipe("tiny", projects.backend(f"# {uuid.uuid4()}\nreturn wheel(wheel_directory)"))
    (folder / "source.tar.gz").write_bytes(projects.archive(projects.backend("return wheel(wheel_directory, version='6.6')")))
    refused(build_tiny(farm), ExitCode.DIGEST, "source.tar.gz")


@pytest.mark.parametrize(
    ("attribute", "version", "words"),
    [
        ("", "1.1", "has the project, but not this version"),
        ('data-yanked="broken headers"', "1.0", "was yanked from the index"),
    ],
    ids=["absent", "yanked"],
)
def test_sdist_that_the_index_does_not_offer(farm: Farm, attribute: str, version: str, words: str) -> None:
    digest = hashlib.sha256(uuid.uuid4().bytes).hexdigest()  # the store does not have it
    link = f'<a href="thing-1.0.tar.gz#sha256={digest}" {attribute}>thing-1.0.tar.gz</a>'
    with fetch_kit.running() as server:
        server.served["/simple/thing/"] = fetch_kit.Served(f"<!DOCTYPE html>{link}".encode(), "text/html")
        farm.recipe("tiny", {}, source={"kind": "sdist", "name": "thing", "version": version, "sha256": digest})
        done = build_tiny(farm, GRACEFARM_PYTHON_INDEX=f"{server.url}/simple/")
    refused(done, ExitCode.FETCH, f"thing {version}", words)


def test_patch_that_does_not_apply(farm: Farm) -> None:
    folder = farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    (folder / "patches").mkdir()
    text = "--- a/backend.py\n+++ b/backend.py\n@@ -1,3 +1,3 @@\n nothing\n-like\n+this\n here\n"
    (folder / "patches" / "0001-wrong.patch").write_text(text)
    refused(build_tiny(farm), ExitCode.SOURCE, "0001-wrong.patch", "backend.py")


def test_build_that_downloads_is_told_what_it_wanted(farm: Farm) -> None:
    body = "import urllib.request\nurllib.request.urlopen('http://wheels.example.org/x.whl', timeout=5)"
    farm.recipe("tiny", projects.backend(body))
    refused(build_tiny(farm), ExitCode.NETWORK, "tried to access the network", "wheels.example.org")


def test_build_that_shrugs_off_a_failed_download_fails_all_the_same(farm: Farm) -> None:
    body = (
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://wheels.example.org/x.whl', timeout=5)\n"
        "except OSError:\n    pass\nreturn wheel(wheel_directory)"
    )
    farm.recipe("tiny", projects.backend(body))
    refused(build_tiny(farm), ExitCode.NETWORK, "wheels.example.org")


def test_build_that_writes_outside(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("open('/usr/lib/mark', 'w')"))
    refused(build_tiny(farm), ExitCode.COMPILE, "Read-only file system", "/usr/lib/mark")


def test_two_wheels(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("wheel(wheel_directory, name='other')\nreturn wheel(wheel_directory)"))
    refused(build_tiny(farm), ExitCode.WHEEL, "other-1.0-py3-none-any.whl", "tiny-1.0-py3-none-any.whl")


def test_no_wheel(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return 'tiny-1.0-py3-none-any.whl'"))
    refused(build_tiny(farm), ExitCode.WHEEL, "no wheel")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("b'PK no archive'", "cannot be unpacked: File is not a zip file"),
        ("b'PK\\x05\\x06' + bytes(18)", "no METADATA in .dist-info"),
    ],
    ids=["no zip", "nothing in it"],
)
def test_a_wheel_that_is_none(farm: Farm, content: str, words: str) -> None:
    body = f"name = 'tiny-1.0-py3-none-any.whl'\nopen(os.path.join(wheel_directory, name), 'wb').write({content})\nreturn name"
    farm.recipe("tiny", projects.backend(body))
    refused(build_tiny(farm), ExitCode.WHEEL, "tiny-1.0-py3-none-any.whl", words)


def test_wrong_version(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory, version='1.0+lost')"))
    refused(build_tiny(farm), ExitCode.AUDIT, "1.0+lost")


def test_object_of_another_architecture(farm: Farm) -> None:
    other = 183 if NATIVE == "x86_64" else 62
    body = (
        "data = bytearray(open('/usr/libexec/gracefarm/python-native', 'rb').read())\n"
        f"data[18:20] = ({other}).to_bytes(2, 'little')\n"
        f"tag = 'cp311-cp311-linux_{NATIVE}'\n"
        f"return wheel(wheel_directory, tag=tag, files={{'tiny/_x.cpython-311-{NATIVE}-linux-gnu.so': bytes(data)}})"
    )
    farm.recipe("tiny", projects.backend(body))
    refused(build_tiny(farm), ExitCode.AUDIT, "elf-machine")


def test_compile_error_shows_the_first_real_error(farm: Farm) -> None:
    files = projects.tree("tiny_c")
    files["core.c"] = "#include <no_such_header.h>\nint broken(void) { return undefined_thing; }\n"
    farm.recipe("tiny", files, name="tiny-c", smoke={"imports": ["tiny_c"]})
    refused(build_tiny(farm), ExitCode.COMPILE, "core.c:1:10: fatal error: no_such_header.h", "builder log tiny")


def test_out_of_memory_is_retried_once_with_fewer_jobs_and_named(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, so that a machine with one core has two for it."""
    monkeypatch.setattr(jobs, "cores", lambda: 2)
    body = "print('JOBS', os.environ['MAX_JOBS'], flush=True)\nkept = bytearray(2_000_000_000)\nreturn wheel(wheel_directory)"
    farm.recipe("tiny", projects.backend(body), build={"cuda": False, "memory_per_job": "128MiB"})
    settings = farm.settings.model_copy(update={"memory": "400MiB"})
    with pytest.raises(MemoryBoundError, match=r"killed at its limit of 0\.4 GiB"):
        build.build(plan_of("tiny", None, NATIVE, settings), BuildOptions(), settings, Console(as_json=True))
    assert "trying again with 1 jobs" in capsys.readouterr().out
    (log,) = (settings.home / "builds").glob("*/log.txt")
    assert [line for line in log.read_text().splitlines() if line.startswith("JOBS")] == ["JOBS 2", "JOBS 1"]


def test_missing_build_requirement_is_named_before_anything_is_compiled(farm: Farm) -> None:
    files = projects.backend("return wheel(wheel_directory)")
    files["pyproject.toml"] = str(files["pyproject.toml"]).replace("requires = []", 'requires = ["meson>=1"]')
    farm.recipe("tiny", files)
    refused(build_tiny(farm), ExitCode.COMPILE, "requires 'meson>=1' (stack bare has no such package)")


@pytest.mark.parametrize("requires", ['["meson>>1"]', '"meson"', "[1]"])
def test_build_requirements_that_are_none(farm: Farm, requires: str) -> None:
    files = projects.backend("return wheel(wheel_directory)")
    files["pyproject.toml"] = str(files["pyproject.toml"]).replace("requires = []", f"requires = {requires}")
    farm.recipe("tiny", files)
    refused(build_tiny(farm), ExitCode.COMPILE, "pyproject.toml of tiny is not valid: ")


def test_a_full_disk_is_recognised_in_any_language(farm: Farm, tmp_path: Path) -> None:
    """cp as it speaks where German is installed: English, if it is told so."""
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    (tmp_path / "cp").write_text(
        "#!/bin/sh\n[ $LC_ALL = C ] && said='No space left on device' || said='Kein Speicherplatz mehr auf dem Gerät'\n"
        'echo "cp: $said" >&2\nexit 1\n'
    )
    (tmp_path / "cp").chmod(0o755)
    refused(build_tiny(farm, PATH=f"{tmp_path}:{os.environ['PATH']}", LC_ALL="de_DE.UTF-8"), ExitCode.DISK, "no space left")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GRACEFARM_MEMORY", "20GB", "'20GB' is not a size such as 3.5GiB"),
        (
            "GRACEFARM_MIRRORS",
            "https://a.example=file:///a https://b.example",
            "'https://b.example' does not have the form OLD=NEW",
        ),
    ],
)
def test_a_setting_that_is_none(farm: Farm, name: str, value: str, words: str) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    refused(build_tiny(farm, **{name: value}), ExitCode.CONFIG, words)


def test_a_relative_home_is_the_working_directorys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """git, uv and the sandbox start elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRACEFARM_HOME", "here/home")
    assert load().home == tmp_path / "here" / "home"


UNSHARE = ("unshare", "--map-root-user", "--mount")
"A private mount without root, where sandboxes can be started at all."


@pytest.mark.parametrize(("room", "words"), [(1 << 18, "No space left on device"), (0, "o space left on")])
def test_full_disk(farm: Farm, room: int, words: str) -> None:
    """With room for a log the build's own words; without, those of who writes first: the log, the record."""
    body = f"""
file = open('/build/tmp/fill', 'wb', buffering=0)
try:
    while True:
        file.write(bytes(4096))
except OSError:
    file.truncate(file.tell() - {room})
    raise
"""
    farm.recipe("tiny", projects.backend(body))
    small = farm.settings.home / "builds"
    small.mkdir()
    command = [sys.executable, "-m", "builder", "build", "tiny", "--target", NATIVE]
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"', small, *command],
        env=projects.environment(farm.environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    refused(projects.Done(code=done.returncode, out=done.stdout, err=done.stderr), ExitCode.DISK, words)


def test_bubblewrap_missing(farm: Farm, tmp_path: Path) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("git", "tar", "dpkg-deb", "patch", "sh", "cp"):
        found = next((Path(folder) / name for folder in os.environ["PATH"].split(":") if (Path(folder) / name).exists()), None)
        if found is not None:
            (tools / name).symlink_to(found)
    refused(build_tiny(farm, PATH=str(tools)), ExitCode.HOST, "bwrap", "builder doctor")


def test_forbidden_user_namespaces_are_known_before_anything_is_fetched(farm: Farm, tmp_path: Path) -> None:
    """bubblewrap as it fails where AppArmor forbids them, which this kernel does not."""
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    done = build_tiny(farm, PATH=f"{tmp_path}:{os.environ['PATH']}")
    refused(done, ExitCode.HOST, "setting up uid map", "builder doctor --fix")
    assert "in the store" not in done.said


@pytest.mark.parametrize("body", ["return wheel(wheel_directory)", "raise RuntimeError('on purpose')"])
def test_credentials_in_the_upload_url_are_refused_and_not_shown(farm: Farm, body: str) -> None:
    """Also where the build would fail: a failed build tells the index too."""
    farm.recipe("tiny", projects.backend(body))
    done = build_tiny(farm, "--publish", "http://me:hunter2@127.0.0.1:9/legacy/")
    refused(done, ExitCode.USAGE, "TWINE_PASSWORD")
    assert "hunter2" not in done.said
    assert "build id" not in done.said, "refused before anything is planned"


def test_unreachable_index_keeps_the_wheel(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    refused(
        build_tiny(farm, "--publish", "http://127.0.0.1:9/legacy/", TWINE_USERNAME="a", TWINE_PASSWORD="b"), ExitCode.PUBLISH
    )
    assert "exists" in farm.run("plan", "tiny", "--target", NATIVE).out


def test_an_address_without_a_path_does_not_hide_why_a_build_failed(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("raise RuntimeError('on purpose')"))
    done = build_tiny(farm, "--publish", "http://127.0.0.1:9", TWINE_USERNAME="a", TWINE_PASSWORD="b")
    refused(done, ExitCode.COMPILE, "RuntimeError: on purpose", "the record was not published: http://127.0.0.1:9: ")


@pytest.mark.skipif(NATIVE == "aarch64", reason="an aarch64 host emulates nothing")
def test_qemu_missing_is_found_and_mended(farm: Farm, shared_home: Path) -> None:
    """qemu is one of the root's packages; a root that lost it is what can be missing."""
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    one = stack.load(farm.settings.project / "stacks", "bare")
    whole = root.ensure(one, host_arch(), Arch.AARCH64, farm.settings).resolve()
    roots = farm.settings.home / "roots"
    roots.unlink()  # a link to the machine's own
    roots.mkdir()
    subprocess.run(["cp", "-al", whole, roots], check=True)
    (roots / whole.name / "usr/bin/qemu-aarch64-static").unlink()
    refused(
        farm.run("build", "tiny", "--target", "aarch64"), ExitCode.ROOT, "/usr/bin/qemu-aarch64-static is missing", "--fix"
    )
    found = farm.run("doctor")
    assert found.code == ExitCode.HOST
    assert "/usr/bin/qemu-aarch64-static is missing" in found.said
    assert farm.run("doctor", "--fix").code == 0
    done = farm.run("build", "tiny", "--target", "aarch64")
    assert done.code == 0, done.said


@pytest.mark.skipif(NATIVE == "aarch64", reason="the target's programs are this machine's own")
def test_programs_of_the_target_need_binfmt(farm: Farm) -> None:
    body = "subprocess.run(['/usr/libexec/gracefarm/python3.11-aarch64', '-c', ''], check=True)\nreturn wheel(wheel_directory)"
    farm.recipe("tiny", projects.backend(body), build={"cuda": False, "binfmt": True})
    done = farm.run("build", "tiny", "--target", "aarch64")
    if binfmt.registration(Arch.AARCH64) is None:
        assert done.code == 0, done.said
    else:
        refused(done, ExitCode.HOST, "this kernel cannot run", "builder doctor --fix")


def test_a_home_that_cannot_be_written_is_one_sentence(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    refused(build_tiny(farm, GRACEFARM_HOME="/sys/nowhere"), ExitCode.HOST, "/sys/nowhere", "GRACEFARM_HOME")
