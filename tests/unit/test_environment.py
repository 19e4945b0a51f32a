"""requirements.lock: what enters the digests, what is refused, which tags are taken."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.tags import Tag

from builder.planning import pins, stack, tags
from builder.planning.stack import Arch, BuildRequirements, LoadedStack
from gracefarm.errors import ConfigError

STACKS = Path(__file__).parent.parent.parent / "stacks"


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedStack:
    """A copy of cu130 that a test may damage."""
    for name in ("stack.toml", "requirements.lock"):
        target = tmp_path / "stacks" / "cu130" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((STACKS / "cu130" / name).read_bytes())
    return stack.load(tmp_path / "stacks", "cu130")


def damage(loaded: LoadedStack, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, loaded.requirements_lock.read_text(), count=1, flags=re.MULTILINE)
    assert count
    loaded.requirements_lock.write_text(text)


def test_one_wheel_per_distribution_and_architecture(loaded: LoadedStack) -> None:
    for arch in Arch:
        found = pins.wheels(loaded, arch)
        assert len({wheel.name for wheel in found}) == len(found)
        assert [wheel.version for wheel in found if wheel.name == "torch"] == [
            loaded.data.torch.version if loaded.data.torch else ""
        ]
    # Each line above a wheel names its file: those with a platform in it differ, the others are the same for both.
    shared = set(pins.wheels(loaded, Arch.AARCH64)) & set(pins.wheels(loaded, Arch.X86_64))
    names = re.findall(r"^# (\S+\.whl)\n(\S+)==", loaded.requirements_lock.read_text(), flags=re.MULTILINE)
    assert {wheel.name for wheel in shared} == {name for file, name in names if file.endswith("-any.whl")}


def test_digests_ignore_comments_white_space_and_order(loaded: LoadedStack) -> None:
    before = pins.environment_digest(loaded, Arch.AARCH64), pins.toolchain_digest(loaded, Arch.X86_64)
    lines = loaded.requirements_lock.read_text().splitlines()
    kept = [f"  {line}  " for line in reversed(lines) if not line.startswith("#")]
    loaded.requirements_lock.write_text("# one comment\n\n" + "\n\n".join(kept))
    assert (pins.environment_digest(loaded, Arch.AARCH64), pins.toolchain_digest(loaded, Arch.X86_64)) == before


def test_digest_changes_with_a_version_and_with_a_hash(loaded: LoadedStack) -> None:
    seen = {pins.environment_digest(loaded, Arch.AARCH64)}
    damage(loaded, r"^sympy==\S+", "sympy==1.13.9")
    seen.add(pins.environment_digest(loaded, Arch.AARCH64))
    damage(loaded, r'^(numpy.*aarch64" --hash=sha256:).{4}', r"\g<1>0000")
    seen.add(pins.environment_digest(loaded, Arch.AARCH64))
    assert len(seen) == 3


def test_digest_of_one_architecture_ignores_the_other(loaded: LoadedStack) -> None:
    before = pins.environment_digest(loaded, Arch.AARCH64), pins.toolchain_digest(loaded, Arch.AARCH64)
    damage(loaded, r'^(nvidia-nvvm.*x86_64" --hash=sha256:).{4}', r"\g<1>0000")
    assert (pins.environment_digest(loaded, Arch.AARCH64), pins.toolchain_digest(loaded, Arch.AARCH64)) == before


def test_toolchain_digest_knows_compilers_alone(loaded: LoadedStack) -> None:
    before = pins.toolchain_digest(loaded, Arch.X86_64)
    damage(loaded, r'^(numpy.*x86_64" --hash=sha256:).{4}', r"\g<1>0000")
    assert pins.toolchain_digest(loaded, Arch.X86_64) == before
    damage(loaded, r'^(nvidia-cuda-nvcc.*x86_64" --hash=sha256:).{4}', r"\g<1>0000")
    assert pins.toolchain_digest(loaded, Arch.X86_64) != before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("six==1.17.0", "--hash=sha256:… is missing"),
        (f"six>=1.17.0 --hash=sha256:{'0' * 64}", "the version is not pinned with =="),
        (f"six --hash=sha256:{'0' * 64}", "does not pin a wheel"),
        (f"six==1.17.0 --hash=sha256:{'0' * 64} --hash=sha256:{'1' * 64}", "has several --hash options"),
        (f"six==1.17.0 ; platform --hash=sha256:{'0' * 64}", "does not pin a wheel"),
        (f"numpy==2.0.0 --hash=sha256:{'0' * 64}", "numpy is pinned twice"),
        ("--extra-index-url file:///somewhere", "--hash=sha256:… is missing"),
        (f"six @ https://host.example/six.whl --hash=sha256:{'0' * 64}", "does not pin a wheel"),
    ],
)
def test_a_line_that_pins_no_wheel_is_refused(loaded: LoadedStack, line: str, says: str) -> None:
    with loaded.requirements_lock.open("a") as stream:
        stream.write(f"{line}\n")
    number = len(loaded.requirements_lock.read_text().splitlines())
    with pytest.raises(ConfigError, match=f":{number}: .*{says}"):
        pins.wheels(loaded, Arch.AARCH64)


@pytest.mark.parametrize(("old", "new"), [('"numpy"', '"numpy>=99"'), ('"numpy"', '"numpy",\n    "scipy"')])
def test_a_lock_older_than_stack_toml_is_refused(loaded: LoadedStack, old: str, new: str) -> None:
    toml = loaded.folder / "stack.toml"
    toml.write_text(toml.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=r"numpy>=99|no scipy") as caught:
        pins.wheels(stack.load(loaded.folder.parent, "cu130"), Arch.AARCH64)
    assert caught.value.repeat == "builder lock cu130"


def test_the_lock_of_a_recipe_names_the_pythons_that_it_leaves_out(loaded: LoadedStack, tmp_path: Path) -> None:
    lock = tmp_path / "thing" / "requirements.lock"
    lock.parent.mkdir()
    build = BuildRequirements(texts=("pure",), lock=lock, lock_command="builder lock thing")
    pin = f"pure==1.0 --hash=sha256:{'0' * 64}"

    def names(*comments: str) -> set[str]:
        lock.write_text("\n".join([*comments, pin]) + "\n")
        return {wheel.name for wheel in pins.wheels(replace(loaded, build_requirements=build), Arch.AARCH64)}

    assert "pure" in names()
    assert "pure" in names(*pins.scope(["3.12", "3.11", "3.9"], {("3.11", Arch.X86_64): "x", ("3.12", Arch.AARCH64): "y"}))
    assert lock.read_text().splitlines()[0] == "# Pythons: 3.9, 3.11, 3.12"
    with pytest.raises(ConfigError, match=r"^thing cannot be built for Python 3\.11 on aarch64: no wheel: none$") as left_out:
        names(*pins.scope(["3.11", "3.12"], {("3.11", Arch.AARCH64): "no wheel: none"}))
    with pytest.raises(ConfigError, match=r"requirements\.lock was written before Python 3\.11 was added$") as older:
        names(*pins.scope(["3.12", "3.13"], {}))
    assert left_out.value.repeat == older.value.repeat == "builder lock thing"


def test_an_absent_lock_is_refused(loaded: LoadedStack) -> None:
    loaded.requirements_lock.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        pins.environment_digest(loaded, Arch.AARCH64)


def test_tags_stop_at_the_stacks_glibc_and_prefer_the_newest(loaded: LoadedStack) -> None:
    found = tags.tags(loaded, Arch.AARCH64)
    assert found[0] == Tag("cp311", "cp311", "manylinux_2_34_aarch64")
    assert Tag("cp311", "cp311", "manylinux_2_35_aarch64") not in found
    assert Tag("py3", "none", "manylinux2014_aarch64") in found
    assert found.index(Tag("cp311", "cp311", "manylinux_2_28_aarch64")) < found.index(
        Tag("cp311", "abi3", "manylinux_2_34_aarch64")
    )
    assert found.index(Tag("cp38", "abi3", "manylinux_2_17_aarch64")) < found.index(Tag("py3", "none", "any"))
    assert not any("x86_64" in tag.platform for tag in found)
