"""Which Python a wheel's tag serves: one rule for the finder, the sets and the matrix."""

from __future__ import annotations

import pytest
from packaging.tags import compatible_tags, cpython_tags, parse_tag

from gracefarm.pythons import serves

PLATFORM = "manylinux_2_34_aarch64"
PYTHONS = ("3.8", "3.10", "3.11", "3.13", "3.13t", "3.14", "3.14t")


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("cp311-cp311", ("3.11",)),
        ("cp313-cp313t", ("3.13t",)),
        ("cp310-abi3", ("3.10", "3.11", "3.13", "3.14")),
        ("cp314-abi3t", ("3.14t",)),
        ("cp313-none", ("3.13", "3.13t")),
        ("py3-none", PYTHONS),
        ("py311-none", ("3.11", "3.13", "3.13t", "3.14", "3.14t")),
        ("py2-none", ()),
        ("pp311-pypy311_pp73", ()),
    ],
)
def test_the_pythons_of_a_tag(tag: str, wanted: tuple[str, ...]) -> None:
    assert (
        tuple(python for python in PYTHONS if any(serves(parsed, python) for parsed in parse_tag(f"{tag}-{PLATFORM}")))
        == wanted
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_tag_that_packaging_gives_a_python_serves_it(python: str) -> None:
    version = tuple(int(part) for part in python.rstrip("t").split("."))
    abis = [f"cp3{version[1]}t"] if python.endswith("t") else None
    own = list(cpython_tags(version, abis=abis, platforms=[PLATFORM]))
    assert [tag for tag in [*own, *compatible_tags(version, platforms=[PLATFORM])] if not serves(tag, python)] == []
