"""`builder build --accept-new`: digests read at first use, with a person's word, shown until a witness confirms them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import Farm
from tests.integration.fetch_kit import sha256
from tests.integration.pinned_kit import URL, mirrors, own_stack, own_wheel, trinity
from tests.integration.test_build import record_of
from tests.integration.test_sets import write_set

NATIVE = host_arch().value


def with_a_gap(farm: Farm, tmp_path: Path) -> Path:
    """The recipe of a project of triton's shape, one digest of which is not known."""
    trinity(farm, tmp_path)
    place = farm.settings.project / "recipes/trinity/recipe.toml"
    gap = f'[[files]]\n# why it is here\nurl = "{URL}"\nsha256_unknown = "not reached"  # yet\nlicense = "MIT"\n'
    gap += 'path = "seed/.triton/nvidia"\nmembers = { "bin/ptxas" = "ptxas/bin/ptxas" }\n\n[[files]]\n'
    gap += f'text = "{URL}"\npath = "seed/.triton/llvm/llvm-1/version.txt"\n'
    kept = [line for line in place.read_text().splitlines() if not line.startswith("files =")]
    place.write_text("\n".join(kept) + "\n" + gap)
    return place


def test_a_digest_of_a_first_use_is_written_down_and_shown_until_a_witness_confirms_it(farm: Farm, tmp_path: Path) -> None:
    place = with_a_gap(farm, tmp_path)
    before = place.read_text()
    command = ("build", "trinity", "--target", NATIVE)
    alone = farm.run(*command, "--accept-new", **mirrors(tmp_path))
    assert (alone.code, place.read_text()) == (2, before), alone.said
    assert "there is no terminal" in alone.said
    assert URL in alone.said

    done = farm.run(*command, "--accept-new", "--yes", **mirrors(tmp_path))
    assert done.code == 0, done.said
    today = datetime.now(tz=UTC).date()
    known = sha256((tmp_path / "tool.tar.gz").read_bytes())
    written = f'# why it is here\nurl = "{URL}"\nsha256 = "{known}"  # yet\naccepted = {{date = {today}, url = "{URL}"}}\n'
    assert written in place.read_text()
    sentence = f"read at first use on {today} from {URL}, not confirmed"
    assert f"seed/.triton/nvidia {known[:16]}: {sentence}" in farm.run("plan", "trinity", "--target", NATIVE).out
    assert record_of(farm, "trinity")["unconfirmed"] == [f"seed/.triton/nvidia {known}: {sentence}"]
    assert sentence in farm.run("show", "trinity").out
    wheel = Path(done.out.strip())
    with zipfile.ZipFile(wheel) as opened:
        document = json.loads(opened.read(next(name for name in opened.namelist() if name.endswith(".spdx.json"))))
    (said,) = [package for package in document["packages"] if package["name"] == "seed/.triton/nvidia"]
    assert said["comment"] == f"digest read at first use on {today}, not confirmed"

    witness = f'witness = [{{ source = "their release notes", value = "{known}" }}]\n'
    place.write_text(place.read_text().replace("accepted =", f"{witness}accepted ="))
    assert "confirmed by their release notes" in farm.run("plan", "trinity", "--target", NATIVE).out
    again = farm.run(*command, **mirrors(tmp_path))
    # The SBOM in the wheel says it no longer: another wheel, by another id.
    assert (again.code, "already built" in again.said) == (0, False), again.said
    assert record_of(farm, "trinity")["unconfirmed"] == []
    place.write_text(place.read_text().replace(f'value = "{known}"', f'value = "{"0" * 64}"'))
    wrong = farm.run("plan", "trinity")
    assert (wrong.code, "differs from sha256" in wrong.said, "Value error" in wrong.said) == (3, True, False), wrong.said


def answered(farm: Farm, tmp_path: Path, answer: bytes) -> tuple[int, str]:
    """`builder build trinity --accept-new` with a person at a terminal, who types the answer."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "builder", "build", "trinity", "--target", NATIVE, "--accept-new"]
    environment = {**os.environ, **farm.environment, **mirrors(tmp_path)}
    os.write(ours, answer)
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment, check=False)
    os.close(ours)
    os.close(theirs)
    return done.returncode, done.stderr


def test_a_person_at_a_terminal_is_asked(farm: Farm, tmp_path: Path) -> None:
    place = with_a_gap(farm, tmp_path)
    # Which ends the build behind the question.
    text = '[[substitutions]]\npath = "python/core.c"\nfind = "no such text"\nreplace = ""\n\n[[files]]\n# why'
    place.write_text(place.read_text().replace("[[files]]\n# why", text))
    before = place.read_text()
    code, said = answered(farm, tmp_path, b"n\n")
    assert (code, place.read_text()) == (2, before), said
    assert "Accept these files as they are now" in said
    code, said = answered(farm, tmp_path, b"y\n")
    assert (code, "'no such text' occurs 0 times" in said) == (13, True), said
    assert "accepted =" in place.read_text()


def test_one_question_for_the_digests_that_cells_or_a_set_lack(farm: Farm, tmp_path: Path) -> None:
    """Each build ends at once, behind the question: its substitution does not fit."""
    place = with_a_gap(farm, tmp_path)
    unfit = '[[substitutions]]\npath = "python/core.c"\nfind = "no such text"\nreplace = ""\n\n[[files]]\n# why'
    place.write_text(place.read_text().replace("[[files]]\n# why", unfit))
    before = place.read_text()
    write_set(farm, "trio", ["trinity"], ["trinity"])
    for command in (("build", "trinity", "--matrix", f"target={NATIVE} python=root"), ("set", "build", "trio")):
        place.write_text(before)
        alone = farm.run(*command, "--accept-new", **mirrors(tmp_path))
        assert (alone.code, place.read_text()) == (2, before), alone.said
        assert "asks for confirmation of 1 digest, but there is no terminal" in alone.said
        done = farm.run(*command, "--accept-new", "--yes", **mirrors(tmp_path))
        assert "'no such text' occurs 0 times" in done.said
        assert done.said.count("accepted, but no second source confirms it: ") == 1
        assert "accepted =" in place.read_text()


def test_an_index_that_says_another_digest_than_its_file_has_is_refused(farm: Farm, tmp_path: Path) -> None:
    data = own_wheel(tmp_path / "index")
    page = tmp_path / "index/own-thing/index.html"
    page.write_text(page.read_text().replace('.whl"', f'.whl#sha256={"0" * 64}"', 1))
    stacks = farm.settings.project / "stacks"
    place = stacks / "bare" / "stack.toml"
    text = place.read_text().replace('requirements = ["build"', 'requirements = ["own-thing==1.0", "build"', 1)
    own = f'[[environment.wheels]]\nname = "own-thing"\nversion = "1.0"\narch = "{NATIVE}"\n'
    own += 'index = "https://torch.example/whl"\nsha256_unknown = "not reached"\n\n'
    place.write_text(text.replace("[toolchain]\n", f"{own}[toolchain]\n", 1))
    before = place.read_text()
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    mirror = {"GRACEFARM_MIRRORS": f"https://torch.example/whl={(tmp_path / 'index').as_uri()}"}
    done = farm.run("build", "tiny", "--target", NATIVE, "--accept-new", "--yes", **mirror)
    assert (done.code, place.read_text()) == (11, before), done.said
    assert f"has sha256 {sha256(data)}, but the index https://torch.example/whl lists {'0' * 64}" in done.said


def test_a_wheel_of_the_stack_whose_index_lists_its_digest_is_accepted_and_shown(farm: Farm, tmp_path: Path) -> None:
    """As torch for CUDA 12.4: an index that is reached says the same digest as its file has."""
    known, index = sha256(own_wheel(tmp_path / "index")), "https://torch.example/whl/cu124"
    page = tmp_path / "index/own-thing/index.html"
    page.write_text(page.read_text().replace('.whl"', f'.whl#sha256={known}"', 1))
    place = own_stack(farm, NATIVE)
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), stack="own")
    mirror = {"GRACEFARM_MIRRORS": f"{index}={(tmp_path / 'index').as_uri()}"}
    done = farm.run("build", "tiny", "--target", NATIVE, "--accept-new", "--yes", **mirror)
    assert done.code == 0, done.said
    today = datetime.now(tz=UTC).date()
    assert f'sha256 = "{known}"\naccepted = {{date = {today}, url = "{index}"}}\n' in place.read_text()
    what, sentence = f"own-thing 1.0 for {NATIVE}", f"read at first use on {today} from {index}, not confirmed"
    assert f"{what} {known[:16]}: {sentence}" in farm.run("plan", "tiny", "--target", NATIVE).out
    assert record_of(farm, "tiny")["unconfirmed"] == [f"{what} {known}: {sentence}"]
    with zipfile.ZipFile(done.out.strip()) as opened:
        document = json.loads(opened.read(next(name for name in opened.namelist() if name.endswith(".spdx.json"))))
    (said,) = [package for package in document["packages"] if package["name"] == "own-thing"]
    assert said["comment"] == f"digest read at first use on {today}, not confirmed"


def test_accept_new_is_about_named_recipes_of_a_project_of_ones_own(farm: Farm, tmp_path: Path) -> None:
    done = farm.run("build", "--changed", "--accept-new", "--yes")
    assert (done.code, "--accept-new and --changed cannot be used together" in done.said) == (2, True), done.said
