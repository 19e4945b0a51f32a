"""Selects the files of a repository, and assigns each to a node that downloads it and a node that verifies it."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gracefarm.errors import DigestError

SKIP = ("original/*", "*.pth", "*.pt", "*.gguf", ".gitattributes")
"Files that an engine with safetensors does not read. Llama 3.1 405B has a second copy of its weights in original/."


class WeightsFile(BaseModel):
    """A file of a repository at a commit. Large files (LFS, Xet) have a sha256, small ones the blob id of git (sha1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    git: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")


class Manifest(BaseModel):
    """The pinned content of a model's folder."""

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
    """The manifest of a repository, without files that match `skip` (shell patterns for the whole path).

    Raises:
        DigestError: a file has no digest, or its path leaves the folder.
    """
    kept = [WeightsFile.model_validate(file) for file in files if not skipped(str(file["path"]), skip)]
    for file in kept:
        if not (file.sha256 or file.git):
            raise DigestError(
                f"{repo}: the Hub has no digest for {file.path}",
                remedy="set the environment variable HF_ENDPOINT to a server that sends the digests of files (files_metadata)",
            )
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise DigestError(f"{repo}: the path {file.path!r} leaves its folder", remedy="do not use this repository")
    return Manifest(repo=repo, commit=commit, files=tuple(sorted(kept, key=lambda file: file.path)))


def skipped(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern. `*.pth` matches at any depth, `original/*` only from the top."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def deal(files: Iterable[WeightsFile], nodes: Sequence[str]) -> dict[str, list[WeightsFile]]:
    """Assign files to nodes: largest first, each to the node with the fewest bytes (LPT: at most 4/3 of the best, here 5 %).

    Ties are resolved by the order of `nodes`, so equal inputs give equal results.
    """
    heap = [(0, index) for index in range(len(nodes))]
    shares: dict[str, list[WeightsFile]] = {node: [] for node in nodes}
    for largest in sorted(files, key=lambda file: (-file.size, file.path)):
        bytes_, index = heap[0]
        shares[nodes[index]].append(largest)
        heapq.heapreplace(heap, (bytes_ + largest.size, index))
    return shares


class Portion(BaseModel):
    """The work of one node in a round."""

    fetch: list[WeightsFile]
    verify: list[tuple[str, WeightsFile]]
    "Files to verify, with the node that downloads each."


def rounds(
    wanted: Manifest,
    final: Mapping[str, int],
    ready: Mapping[str, Mapping[str, int]],
    nodes: Sequence[str],
) -> dict[str, Portion]:
    """The work of each node in the next round: verify the downloaded files, and download and verify the missing ones.

    A file is verified by the next node in the ring, so never by the node that downloaded it, unless there is only one node.
    Files that an absent node has downloaded are verified by the others.
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
    """A number of bytes as text, in decimal units like the Hub."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
