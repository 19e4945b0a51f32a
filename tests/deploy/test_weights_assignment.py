"""Which node downloads and which node verifies each file of the weights."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.rehearsal import hub
from deploy.steps import assignment
from deploy.steps.assignment import WeightsFile
from gracefarm.errors import DigestError


def lower_bound(files: Sequence[WeightsFile], nodes: int) -> float:
    """Bytes that the busiest node has in any split at least.

    The mean; the largest file; and since some node has ceil(files/nodes) files, the smallest so many.
    """
    sizes = sorted(file.size for file in files)
    return max(sum(sizes) / nodes, sizes[-1] if sizes else 0, sum(sizes[: -(-len(sizes) // nodes)]))


def test_the_deal_of_the_real_shape_is_within_five_percent_of_the_best() -> None:
    """191 files of 4.2 to 4.9 GB over 2 to 16 nodes, as Llama 3.1 405B's are."""
    source = random.Random(405)
    files = [
        WeightsFile(path=f"{n}", size=source.randrange(4_200_000_000, 4_900_000_000), sha256="0" * 64) for n in range(191)
    ]
    for count in range(2, 17):
        shares = assignment.deal(files, [f"k{n}" for n in range(count)])
        assert max(sum(file.size for file in share) for share in shares.values()) <= 1.05 * lower_bound(files, count)


@given(sizes=st.lists(st.integers(0, 100), max_size=7), count=st.integers(1, 3))
def test_no_split_at_all_is_better_than_the_bound(sizes: list[int], count: int) -> None:
    files = [WeightsFile(path=str(n), size=size, sha256="0" * 64) for n, size in enumerate(sizes)]
    splits = itertools.product(range(count), repeat=len(sizes))
    best = min(
        max(sum(size for size, node in zip(sizes, split, strict=True) if node == n) for n in range(count)) for split in splits
    )
    assert lower_bound(files, count) <= best


@given(
    sizes=st.lists(st.integers(0, 10**12), max_size=40),
    count=st.integers(1, 8),
    final=st.sets(st.integers(0, 39)),
    ready=st.dictionaries(st.integers(0, 39), st.integers(0, 9)),
)
def test_every_missing_file_is_fetched_or_verified_exactly_once_and_not_by_its_stager(
    sizes: list[int], count: int, final: set[int], ready: dict[int, int]
) -> None:
    files = [
        WeightsFile(path=f"f{n}", size=size, sha256=hashlib.sha256(b"%d" % n).hexdigest()) for n, size in enumerate(sizes)
    ]
    pinned = assignment.Manifest(repo="org/model", commit=hub.COMMIT, files=tuple(files))
    nodes = [f"k{n}" for n in range(count)]
    there = {f"f{n}": sizes[n] for n in final if n < len(sizes)}
    staged: dict[str, dict[str, int]] = {}
    for n, node in ready.items():
        if n < len(sizes):
            staged.setdefault(f"k{node}", {})[f"f{n}"] = sizes[n]
    shares = assignment.rounds(pinned, there, staged, nodes)
    verified = sorted(file.path for share in shares.values() for _, file in share.verify)
    assert verified == sorted(file.path for file in files if file.path not in there)
    fetched = [file.path for share in shares.values() for file in share.fetch]
    assert len(fetched) == len(set(fetched))
    assert not set(fetched) & {path for paths in staged.values() for path in paths}
    if count > 1:
        assert all(stager != node for node, share in shares.items() for stager, _ in share.verify)


def test_a_path_that_leaves_its_folder_is_refused() -> None:
    with pytest.raises(DigestError, match="leaves its folder"):
        assignment.manifest("org/model", hub.COMMIT, [{"path": "a/../../x", "size": 1, "sha256": "0" * 64}])
    with pytest.raises(DigestError, match="no digest"):
        assignment.manifest("org/model", hub.COMMIT, [{"path": "x", "size": 1}])
