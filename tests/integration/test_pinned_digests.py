"""Digests of the pinned builds that are not known: they are listed, the build is refused, and `builder lock` fills them in."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from builder.planning import gaps, pins, recipe, stack
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice
from builder.toolchains.container import ContainerToolchain
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.gaps_kit import GAPS, put_back
from tests.integration.fetch_kit import sha256
from tests.integration.pinned_kit import NATIVE, URL, mirrors, own_stack, own_wheel, trinity


@pytest.fixture
def unread(tmp_path: Path) -> Path:
    """A copy of the committed recipes and stacks with every gap in it."""
    for name in ("recipes", "stacks"):
        shutil.copytree(REPOSITORY / name, tmp_path / "unread" / name)
    put_back(tmp_path / "unread")
    return tmp_path / "unread"


ENGINE = {"aphrodite-flash-attn": "aphrodite-flash-attn==2.6.1.post2"}


@pytest.mark.parametrize(
    ("name", "stack_name", "requires", "substitutions"),
    [
        ("triton", "cu124", {}, 0),
        ("triton", "cu130", {}, 0),
        ("flash_attn", "cu124", {}, 1),
        ("flash_attn", "cu130", {"torch": "torch==2.11.0"}, 1),
        ("aphrodite", "cu124", {**ENGINE, "triton": "triton==3.2.0+git755d4164"}, 1),
        # torch 2.11.0 requires another triton, so there is no pin of it.
        ("aphrodite", "cu130", {**ENGINE, "torch": "torch==2.11.0", "torchvision": "torchvision"}, 10),
    ],
)
def test_the_plan_shows_every_digest_or_the_named_gap(
    name: str, stack_name: str, requires: dict[str, str], substitutions: int
) -> None:
    done = projects.run_builder(["plan", name, "--stack", stack_name], {"GRACEFARM_PROJECT": str(REPOSITORY)})
    assert done.code == 0, done.said
    data = recipe.load(REPOSITORY / "recipes", name).data
    assert data.source.kind == "git"
    assert {data.source.commit, data.source.tree} <= set(re.findall(r"[0-9a-f]{40}", done.out))
    for repository in (*data.repositories, *data.source.submodules.values()):
        assert repository.commit in done.out
    for file in data.files:
        if file.origin:
            assert (file.sha256 or "") in done.out
            gap = [line for line in done.out.splitlines() if line.startswith("no digest ") and file.origin in line]
            assert bool(gap) == (file.sha256 is None), file.origin
    torch = [line for line in done.out.splitlines() if line.startswith("no digest torch")]
    known = {wheel.name: wheel for wheel in pins.wheels(stack.load(REPOSITORY / "stacks", stack_name), Arch.AARCH64)}
    assert bool(torch) == (not known["torch"].sha256 and name != "triton")
    start = done.out.index("{")
    inputs = json.JSONDecoder().raw_decode(done.out, start)[0]
    assert inputs["recipe"]["requires"] == requires
    assert len(inputs["recipe"]["substitutions"]) == substitutions


def test_the_digests_that_are_not_known_are_exactly_these(unread: Path) -> None:
    """With the digests that were filled in since put back: in these three places, and in no other."""
    found: dict[str, list[str]] = {}
    for name in recipe.names(unread / "recipes"):
        for gap in gaps.of_recipe(recipe.load(unread / "recipes", name)):
            found.setdefault(str(gap.file.relative_to(unread)), []).append(gap.url)
    for name in stack.names(unread / "stacks"):
        loaded = stack.load(unread / "stacks", name)
        images = [(gap, loaded.data.container[Arch(gap.table[-1])].name) for gap in gaps.of_images(loaded)]
        for gap, address in [*((gap, gap.url) for gap in gaps.of_stack(loaded)), *images]:
            found.setdefault(str(gap.file.relative_to(unread)), []).append(address)
    assert found == GAPS
    assert sum(map(len, found.values())) == 3


@pytest.mark.parametrize(
    ("name", "waits_for"),
    [
        ("triton", GAPS["recipes/triton/recipe.toml"]),
        ("flash_attn", ["https://download.pytorch.org/whl/cu124"]),
        ("aphrodite", ["https://download.pytorch.org/whl/cu124"]),
    ],
)
def test_a_recipe_waits_for_the_digests_of_what_it_uses_alone(name: str, waits_for: list[str], unread: Path) -> None:
    loaded, base = recipe.load(unread / "recipes", name), stack.load(unread / "stacks", "cu124")
    planned = choice.make_plan(loaded, base, host_arch(), Arch.AARCH64)
    assert [gap.url for gap in planned.gaps] == waits_for
    assert planned.toolchain.installed(planned).keys() >= {"pybind11", "nvidia-cuda-runtime-cu12"}
    assert ("torch" in planned.toolchain.installed(planned)) == (name != "triton")
    contained = replace(planned, toolchain=ContainerToolchain(engine="podman", cibuildwheel="4"))
    assert [gap.url for gap in contained.gaps][:-1] == waits_for
    assert contained.gaps[-1].what.startswith("image docker.io/pytorch/")


def test_a_gap_is_planned_refused_filled_in_by_a_lock_and_then_built(farm: Farm, tmp_path: Path) -> None:
    trinity(farm, tmp_path)
    place = farm.settings.project / "recipes/trinity/recipe.toml"
    known = sha256((tmp_path / "tool.tar.gz").read_bytes())
    gap = f'[[files]]\n# why it is here\nurl = "{URL}"\nsha256_unknown = "not reached"  # yet\n'
    gap += 'path = "seed/.triton/nvidia"\nmembers = { "bin/ptxas" = "ptxas/bin/ptxas" }\nlicense = "MIT"\n\n[[files]]\n'
    gap += f'text = "{URL}"\npath = "seed/.triton/llvm/llvm-1/version.txt"\n'
    lines = [line for line in place.read_text().splitlines() if not line.startswith("files =")]
    place.write_text("\n".join(lines) + "\n" + gap)
    planned = farm.run("plan", "trinity")
    assert planned.code == 0, planned.said
    assert f"no digest seed/.triton/nvidia {URL}: not reached" in planned.said
    refused = farm.run("build", "trinity", "--target", NATIVE)
    assert refused.code == 3
    assert "builder lock trinity" in refused.said
    assert f"{URL}" in refused.said
    assert "GRACEFARM_MIRRORS='https://blobs.example/=REPLACEMENT'" in refused.said
    changed = farm.run("build", "--changed", "--target", NATIVE)
    assert changed.code == 0, changed.said
    assert "skipped: trinity on stack bare cannot be built" in changed.said
    unreachable = farm.run("lock", "trinity")
    assert unreachable.code == 10, unreachable.said
    assert "GRACEFARM_MIRRORS='https://blobs.example/=REPLACEMENT'" in unreachable.said
    assert farm.run("lock", "trinity", **mirrors(tmp_path)).code == 0
    assert f'# why it is here\nurl = "{URL}"\nsha256 = "{known}"  # yet\npath' in place.read_text()
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 0, done.said


@pytest.mark.parametrize("name", ["flash_attn", "aphrodite", "triton"])
def test_a_pinned_recipe_is_refused_with_its_address_and_the_setting_for_a_mirror(name: str, unread: Path) -> None:
    before = os.times()
    done = projects.run_builder(["build", name], {"GRACEFARM_PROJECT": str(unread)})
    after = os.times()
    assert done.code == 3, done.said
    # At once: nothing is fetched or assembled before.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
    first = {"triton": "https://oaitriton.blob.core.windows.net/"}.get(name, "https://download.pytorch.org/")
    assert first in done.said
    assert f"builder lock {name}" in done.said
    assert f"GRACEFARM_MIRRORS='{first}=REPLACEMENT'" in done.said
    if name == "triton":
        shown = (REPOSITORY / "docs/howto/pinned.md").read_text()
        for line in ("error: ", "remedy: "):
            assert next(message for message in done.err.splitlines() if message.startswith(line)) in shown, (
                "the page shows what is said"
            )


def test_a_gap_that_cannot_be_filled_stops_no_other_and_an_image_is_read_when_asked_for(unread: Path, tmp_path: Path) -> None:
    """One of three is there, two hosts are not; a stack's torch and image are read when they are asked for."""
    (tmp_path / "index/torch").mkdir(parents=True)
    torch = "torch-2.4.0-cp311-cp311-linux_aarch64.whl"
    (tmp_path / "index/torch/index.html").write_text(f'<a href="{torch}#sha256={"ab" * 32}">{torch}</a>')
    (tmp_path / "there").mkdir()
    (tmp_path / "there/more.zip").write_bytes(b"more")
    place = unread / "recipes/triton/recipe.toml"
    more = "".join(
        f'[[files]]\nurl = "https://{host}/more.zip"\nsha256_unknown = "not reached"\npath = "{host}"\n\n'
        for host in ("there.example", "gone.example")
    )
    place.write_text(place.read_text().replace("[build]\n", f"{more}[build]\n", 1))
    places = {"https://there.example/": "there/", "https://download.pytorch.org/whl/cu124": "index", "https://": "gone/"}
    environment = {
        "GRACEFARM_PROJECT": str(unread),
        "GRACEFARM_HOME": str(tmp_path / "home"),
        "GRACEFARM_MIRRORS": " ".join(f"{url}={tmp_path.as_uri()}/{folder}" for url, folder in places.items()),
    }
    done = projects.run_builder(["lock", "triton"], environment)
    assert done.code == 50, done.said
    assert "2 of 3 digests could not be fetched; see the errors above" in done.said
    assert "download.pytorch.org" not in done.said
    assert "registry-1.docker.io" not in done.said
    left = gaps.of_recipe(recipe.load(unread / "recipes", "triton"))
    assert [gap.url for gap in left] == [*GAPS["recipes/triton/recipe.toml"], "https://gone.example/more.zip"]
    assert f'sha256 = "{sha256(b"more")}"' in place.read_text()
    assert len(gaps.of_stack(stack.load(unread / "stacks", "cu124"))) == 1
    again = projects.run_builder(["lock", "cu124", "--digests"], environment)
    assert (again.code, "which only --toolchain container requires" in again.said) == (0, True), again.said
    loaded = stack.load(unread / "stacks", "cu124")
    assert gaps.of_stack(loaded) == []
    assert len(gaps.of_images(loaded)) == 1
    asked = projects.run_builder(["lock", "cu124", "--digests", "--toolchain", "container"], environment)
    assert asked.code == 10, asked.said
    assert "GRACEFARM_MIRRORS='https://registry-1.docker.io/=REPLACEMENT'" in asked.said


def test_a_wheel_of_an_index_of_its_own_is_a_gap_then_locked_then_installed(farm: Farm, tmp_path: Path) -> None:
    data = own_wheel(tmp_path / "index")
    place = own_stack(farm, NATIVE)
    farm.recipe(
        "tiny", projects.backend("import own_thing\nassert own_thing.answer == 42\nreturn wheel(wheel_directory)"), stack="own"
    )
    refused = farm.run("build", "tiny", "--target", NATIVE)
    assert refused.code == 3, refused.said
    assert "GRACEFARM_MIRRORS='https://torch.example/=REPLACEMENT'" in refused.said
    unreachable = farm.run("lock", "own", "--digests")
    assert unreachable.code == 10, unreachable.said
    assert "GRACEFARM_MIRRORS='https://torch.example/=REPLACEMENT'" in unreachable.said
    mirror = {"GRACEFARM_MIRRORS": f"https://torch.example/whl/cu124={(tmp_path / 'index').as_uri()}"}
    locked = farm.run("lock", "own", "--digests", **mirror)
    assert locked.code == 0, locked.said
    assert f'sha256 = "{sha256(data)}"' in place.read_text()
    done = farm.run("build", "tiny", "--target", NATIVE, **mirror)
    assert done.code == 0, done.said
    (tmp_path / "index/own-thing/own_thing-1.0-py3-none-any.whl").write_bytes(data + b"changed")
    remove_tree(farm.settings.home / "builds")
    place.write_text(place.read_text().replace(sha256(data), sha256(data + b"another")))
    changed = farm.run("build", "tiny", "--target", NATIVE, **mirror)
    assert changed.code == 11, changed.said
