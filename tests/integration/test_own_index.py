"""A wheel from its own index, which also has the version for other Pythons and architectures: with and without digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.fetch import own_index, unpinned
from builder.planning import pins, stack, tags
from builder.planning.pins import LockedWheel
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch
from gracefarm.errors import DigestError, FetchError
from tests.conftest import REPOSITORY
from tests.integration.fetch_kit import sha256
from tests.integration.test_environment import make_wheel

INDEX = "https://torch.example/whl/cu124"
OURS = "cp311-cp311-linux_aarch64"
TAGS = tags.tags(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64)


def page(folder: Path, tags: list[str], *, digests: bool) -> dict[str, str]:
    """A static index with a file of torch 2.4.0 per tag; the digest of each."""
    found, links = {}, ""
    for tag in tags:
        place = make_wheel(folder / "torch", "torch", "2.4.0", {"torch.py": f"tag = '{tag}'\n"}, tag)
        found[tag] = sha256(place.read_bytes())
        links += f'<a href="{place.name}{f"#sha256={found[tag]}" if digests else ""}">{place.name}</a>\n'
    (folder / "torch" / "index.html").write_text(links)
    return found


def pinned(digest: str) -> LockedWheel:
    """What a lock says of the wheel."""
    return LockedWheel(name="torch", version="2.4.0", sha256=digest, index=INDEX, tags=frozenset(TAGS))


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    """Settings of a machine with an empty store and a mirror of that index."""
    mirrors = {INDEX: (tmp_path / "index").as_uri()}
    return Settings.model_validate(load().model_dump() | {"home": tmp_path / "home", "mirrors": mirrors})


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("locked_here", [True, False], ids=["lock's own store", "fresh store"])
def test_the_file_for_this_python_is_taken_whatever_stands_before_it(
    tmp_path: Path, here: Settings, digests: bool, locked_here: bool
) -> None:
    known = page(tmp_path / "index", ["cp310-cp310-linux_aarch64", OURS, "cp311-cp311-linux_x86_64"], digests=digests)
    filename, url, said = own_index.find_wheel("torch", "2.4.0", TAGS, INDEX, here)
    assert (filename, said) == (f"torch-2.4.0-{OURS}.whl", known[OURS] if digests else None)
    if locked_here:
        assert unpinned.bring(url, filename, here) == known[OURS]
    place, name = own_index.fetch_wheel(pinned(known[OURS]), here)
    assert name == f"torch-2.4.0-{OURS}.whl"
    assert sha256(place.read_bytes()) == known[OURS]


def test_an_index_that_does_not_tell_two_fitting_files_apart_is_refused(tmp_path: Path, here: Settings) -> None:
    known = page(tmp_path / "index", [OURS, "cp311-cp311-manylinux_2_28_aarch64"], digests=False)
    with pytest.raises(FetchError, match="has several wheels that fit the stack, and lists no sha256 for them") as caught:
        own_index.find_wheel("torch", "2.4.0", TAGS, INDEX, here)
    assert "#sha256=" in caught.value.remedy
    with pytest.raises(FetchError, match="has several wheels that fit the stack, and lists no sha256 for them"):
        own_index.fetch_wheel(pinned(known[OURS]), here)


def test_what_an_index_has_for_others_alone_or_with_another_digest_is_not_taken(tmp_path: Path, here: Settings) -> None:
    known = page(tmp_path / "index", ["cp310-cp310-linux_aarch64"], digests=False)
    with pytest.raises(FetchError, match="has no wheel that fits the stack"):
        own_index.fetch_wheel(pinned(next(iter(known.values()))), here)
    page(tmp_path / "index", [OURS], digests=True)
    with pytest.raises(DigestError, match="has no file with sha256"):
        own_index.fetch_wheel(pinned("0" * 64), here)


def test_an_environment_and_a_set_ask_for_the_tags_of_the_stack() -> None:
    (torch,) = [wheel for wheel in pins.wheels(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64) if wheel.index]
    assert torch.tags == set(TAGS)
