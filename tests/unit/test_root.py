"""root.lock: what enters the digest, what is refused; where the mirror is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builder.fetch import debian_mirror
from builder.planning import packages, stack
from builder.planning.stack import Arch, LoadedStack
from gracefarm.errors import ConfigError

STACKS = Path(__file__).parent.parent.parent / "stacks"
CROSS = (Arch.X86_64, Arch.AARCH64)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedStack:
    """A copy of cu130 that a test may damage."""
    for name in ("stack.toml", "root.lock", "requirements.lock"):
        target = tmp_path / "stacks" / "cu130" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((STACKS / "cu130" / name).read_bytes())
    return stack.load(tmp_path / "stacks", "cu130")


def test_digest_ignores_comments_white_space_and_order(loaded: LoadedStack) -> None:
    before = packages.root_digest(loaded, *CROSS)
    lines = loaded.root_lock.read_text().splitlines()
    start = lines.index("[roots.x86_64-aarch64]") + 2
    end = lines.index("]", start)
    lines[start:end] = [f"  {line.strip()}  # why" for line in reversed(lines[start:end])]
    loaded.root_lock.write_text("# another comment\n\n" + "\n".join(lines) + "\n")
    assert packages.root_digest(loaded, *CROSS) == before


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r'(name = "sed", arch = "amd64", version = ")[^"]+', r"\g<1>9.9"),
        (r'(name = "sed".*sha256 = ")[0-9a-f]{4}', r"\g<1>0000"),
        (r'    \{ name = "procps".*\n', ""),
    ],
    ids=["version", "sha256", "package"],
)
def test_digest_changes_with_each_package(loaded: LoadedStack, pattern: str, replacement: str) -> None:
    before = packages.root_digest(loaded, *CROSS)
    text, count = re.subn(pattern, replacement, loaded.root_lock.read_text())
    assert count
    loaded.root_lock.write_text(text)
    if not replacement:
        # What stack.toml does not name may be missing; what it names may not.
        with pytest.raises(ConfigError, match=r"procps:amd64"):
            packages.root_digest(loaded, *CROSS)
        toml = loaded.folder / "stack.toml"
        toml.write_text(toml.read_text().replace('    "procps",\n', ""))
        loaded = stack.load(loaded.folder.parent, "cu130")
    assert packages.root_digest(loaded, *CROSS) != before


def test_each_host_and_target_has_its_own_digest(loaded: LoadedStack) -> None:
    pairs = [(host, target) for host, targets in loaded.root.hosts.items() for target in targets]
    assert len({packages.root_digest(loaded, *pair) for pair in pairs}) == len(pairs) == 3


def test_digest_knows_our_own_scripts(loaded: LoadedStack, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packages.root_digest(loaded, *CROSS)
    monkeypatch.setattr(packages, "ROOT_LAYOUT", packages.ROOT_LAYOUT + 1)
    assert packages.root_digest(loaded, *CROSS) != before


def test_a_pair_that_is_not_locked_is_refused(loaded: LoadedStack) -> None:
    with pytest.raises(ConfigError, match="no root for target x86_64 on an aarch64 host") as caught:
        packages.of_root(loaded, Arch.AARCH64, Arch.X86_64)
    assert caught.value.repeat == "builder lock cu130"


def test_a_lock_older_than_stack_toml_is_refused(loaded: LoadedStack) -> None:
    toml = loaded.folder / "stack.toml"
    toml.write_text(toml.read_text().replace('"sed",', '"sed",\n    "gawk",'))
    with pytest.raises(
        ConfigError, match=r"no package gawk:amd64 for x86_64-aarch64 \(host-target\), but stack\.toml requires it"
    ):
        packages.of_root(stack.load(loaded.folder.parent, "cu130"), *CROSS)


def test_a_package_outside_the_archive_is_refused(loaded: LoadedStack) -> None:
    text = loaded.root_lock.read_text().replace('path = "pool/main/b/bash', 'path = "../../bash', 1)
    loaded.root_lock.write_text(text)
    with pytest.raises(ConfigError, match="path"):
        packages.of_root(loaded, *CROSS)


def test_the_lock_names_no_host() -> None:
    for name in ("root.lock", "requirements.lock"):
        assert "://" not in (STACKS / "cu130" / name).read_text()


def test_each_package_is_locked_once(loaded: LoadedStack) -> None:
    for host, targets in loaded.root.hosts.items():
        for target in targets:
            versions: dict[str, set[str]] = {}
            for package in packages.of_root(loaded, host, target):
                versions.setdefault(f"{package.name}:{package.arch}", set()).add(package.version)
            assert all(len(numbers) == 1 for numbers in versions.values())


def test_the_mirror_is_the_one_that_apt_uses() -> None:
    listing = (
        "'https://other.example/docker/dists/bookworm/InRelease' a 0 \n"
        "'http://mirror.example/debian/dists/bookworm-updates/InRelease' b 0 \n"
        "'http://mirror.example/debian/dists/bookworm/InRelease' c 0 \n"
        "'http://mirror.example/debian-security/dists/bookworm-security/InRelease' d 0 \n"
    )
    assert debian_mirror.parse_sources(listing, ("bookworm",)) == "http://mirror.example/debian"


def test_the_mirror_of_another_suite_has_ours_as_well() -> None:
    listing = "'http://mirror.example/debian/dists/trixie/InRelease' c 0 \n"
    assert debian_mirror.parse_sources(listing, ("bookworm", "trixie")) == "http://mirror.example/debian"
    assert debian_mirror.parse_sources(listing, ("bookworm",)) is None


def test_the_default_mirror_is_read_from_mmdebstraps_manual() -> None:
    text = "=item B<MIRROR>\n\nIf no I<MIRROR> option is provided, L<http://archive.example/debian> is used.\n"
    assert debian_mirror.parse_manual(text) == "http://archive.example/debian"
    assert debian_mirror.parse_manual("another manual") is None
