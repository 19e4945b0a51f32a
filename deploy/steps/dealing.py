"""Which files of a repository are weights to serve, and which node fetches and which verifies each: pure arithmetic."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gracefarm.errors import DigestError

SKIP = ("original/*", "*.pth", "*.pt", "*.gguf", ".gitattributes")
"What an engine that reads safetensors never opens; Llama 3.1 405B has its weights a second time in original/."


class WeightsFile(BaseModel):
    """A file of a repository at a commit. Large files (LFS, Xet) have a sha256, small ones git's blob id (sha1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    git: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")


class Manifest(BaseModel):
    """What is to be there in the end: the pinned content of a model's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    repo: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: tuple[WeightsFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def manifest(repo: str, commit: str, files: Iterable[Mapping[str, object]], *, skip: Sequence[str] = SKIP) -> Manifest:
    """The manifest of a repository, without what `skip` (shell patterns over whole paths) names.

    Raises:
        DigestError: a file has no digest or a path that leaves its folder, so it cannot be verified.
    """
    kept = [WeightsFile.model_validate(file) for file in files if not skipped(str(file["path"]), skip)]
    for file in kept:
        if not (file.sha256 or file.git):
            raise DigestError(
                f"{repo}: the Hub gives no digest for {file.path}", remedy="use a Hub that serves files_metadata"
            )
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise DigestError(f"{repo}: the path {file.path!r} leaves its folder", remedy="do not use this repository")
    return Manifest(repo=repo, commit=commit, files=tuple(sorted(kept, key=lambda file: file.path)))


def skipped(path: str, patterns: Sequence[str]) -> bool:
    """`*.pth` is meant at any depth, `original/*` from the top."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def deal(files: Iterable[WeightsFile], nodes: Sequence[str]) -> dict[str, list[WeightsFile]]:
    """Largest file first, each to the node with the fewest bytes so far (LPT: at most 4/3 of the best, here within 5 %).

    Ties go by the order of `nodes`, so equal input gives an equal deal.
    """
    heap = [(0, index) for index in range(len(nodes))]
    shares: dict[str, list[WeightsFile]] = {node: [] for node in nodes}
    for largest in sorted(files, key=lambda file: (-file.size, file.path)):
        bytes_, index = heap[0]
        shares[nodes[index]].append(largest)
        heapq.heapreplace(heap, (bytes_ + largest.size, index))
    return shares


class Portion(BaseModel):
    """One node's work in a round."""

    fetch: list[WeightsFile]
    verify: list[tuple[str, WeightsFile]]
    "Who stages it, and what."


def rounds(
    wanted: Manifest,
    final: Mapping[str, int],
    ready: Mapping[str, Mapping[str, int]],
    nodes: Sequence[str],
) -> dict[str, Portion]:
    """Who does what next: files that are verified need nothing, staged ones a verifier, all others a node that fetches them.

    A file is verified by the node after its stager in the ring, so never by the stager itself unless there is one node alone.
    What an absent node has staged is verified by the others.
    """
    missing = {file.path: file for file in wanted.files if final.get(file.path) != file.size}
    shares = {node: Portion(fetch=[], verify=[]) for node in nodes}
    for stager, staged in sorted(ready.items()):
        for path in sorted(staged):
            waiting = missing.get(path)
            if waiting is not None and staged[path] == waiting.size:
                del missing[path]
                shares[_after(stager, nodes, path)].verify.append((stager, waiting))
    for node, files in deal(missing.values(), nodes).items():
        shares[node].fetch.extend(files)
        shares[_after(node, nodes, "")].verify.extend((node, file) for file in files)
    return shares


def _after(stager: str, nodes: Sequence[str], path: str) -> str:
    if stager not in nodes:
        return nodes[len(path) % len(nodes)]
    return nodes[(nodes.index(stager) + 1) % len(nodes)]


def told(count: int) -> str:
    """Bytes for people, as hubs and disks count them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
