"""A Hub for the real huggingface_hub: a repository of files with real digests, and faults for tests.

It replaces huggingface.co. Its answers have the headers that the client reads.

    python -m deploy.rehearsal.hub --port 8091      # a small Llama with 191 weight files; prints the URL for HF_ENDPOINT
    python -m deploy.rehearsal.hub --folder MODEL   # the files of a folder
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5e" * 20
BLOCK = 1 << 14
Content = bytes | Path
"The content of a file, or its path."


def git_id(content: bytes) -> str:
    """The blob id of git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@cache
def sha256(content: Content) -> str:
    """The sha256 of a file, which must not change while it is served."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blocks(content: Content) -> Iterator[bytes]:
    """The bytes of a file."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def size_of(content: Content) -> int:
    """The size of a file in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def of_folder(folder: Path) -> dict[str, Content]:
    """All files below a folder. Small ones are read, since their blob ids depend on the content."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path if large(path.name) else path.read_bytes() for path in paths}


def large(name: str) -> bool:
    """Whether the Hub stores a file in LFS."""
    return name.endswith((".safetensors", ".pth", "tokenizer.json"))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3328,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 16032,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"Llama 3.1 405B with an eighth or a sixteenth of its widths. It has 126 layers and 8 KV heads, so the same layouts are valid."


def llama(count: int = 191, size: int = 20_000, *, seed: int = 405) -> dict[str, bytes]:
    """The repository of a small Llama: `count` safetensors files with their index, and the usual other files."""
    source = random.Random(seed)  # noqa: S311 - as above
    files: dict[str, bytes] = {}
    weight_map = {}
    for number in range(1, count + 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        tensor = f"model.part.{number}.weight"
        files[name] = safetensors(tensor, source.randbytes(round(size * source.uniform(0.8, 1.2))))
        weight_map[tensor] = name
    total = sum(len(content) for content in files.values())
    return {
        **files,
        "model.safetensors.index.json": json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode(),
        "config.json": json.dumps(LLAMA, indent=1).encode(),
        "generation_config.json": b'{"bos_token_id": 1, "eos_token_id": 2}',
        "tokenizer.json": source.randbytes(2000),
        "tokenizer_config.json": b"{}",
        "original/consolidated.00.pth": b"not wanted",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }


def safetensors(tensor: str, data: bytes) -> bytes:
    """A file with one tensor. Its header has the sha256 of the data, which the simulated engine checks."""
    about = {
        "__metadata__": {"format": "pt", "sha256": hashlib.sha256(data).hexdigest()},
        tensor: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
    }
    header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + data


@dataclass
class Hub:
    """One repository, and its faults."""

    files: Mapping[str, Content]
    repo: str = "org/model"
    url: str = ""
    token: str | None = None
    "If set, all requests require it."
    gated: bool = False
    "Files are refused with 403, as for an account that has not accepted the licence (401 without a token)."
    corrupt: dict[str, int] = field(default_factory=dict)
    "Number of corrupt downloads by path."
    busy: int = 0
    "HTTP status, such as 429 or 503, of the next `busy_answers` answers."
    busy_answers: int = 0
    quiet_answers: int = 0
    "Number of normal answers before these."
    retry_after: str | None = None
    "Header Retry-After of these answers: seconds or a date."
    rate: float | None = None
    "Bytes per second for each node, which is identified by its User-Agent."
    served: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    "Paths of complete downloads by node."
    tokens: set[str] = field(default_factory=set)
    _next: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_turn(self, node: str, count: int) -> None:
        """Sleep until `node` may receive `count` more bytes. All connections of a node share its rate."""
        if self.rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next[node])
            self._next[node] = start + count / self.rate
        time.sleep(max(0.0, start + count / self.rate - time.monotonic()))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: Hub) -> None:
        super().__init__(address, _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.hub.quiet_answers > 0:
            self.hub.quiet_answers -= 1
        elif self.hub.busy_answers > 0:
            self.hub.busy_answers -= 1
            more = {"Retry-After": self.hub.retry_after} if self.hub.retry_after else {}
            return self.refuse(self.hub.busy, "", "Service is busy", more)
        path = unquote(urlsplit(self.path).path)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given:
            self.hub.tokens.add(given)
        if self.hub.token and given != self.hub.token:
            return self.refuse(401, "RepoNotFound", "Repository Not Found")
        if match := re.fullmatch(rf"/api/models/{self.hub.repo}(/revision/[^/]+)?", path):
            if match.group(1) not in (None, "/revision/main", f"/revision/{COMMIT}"):
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return self.send(json.dumps(self.info()).encode(), {"Content-Type": "application/json"}, body=body)
        if path == f"/api/models/{self.hub.repo}/auth-check":
            return self.forbid() if self.hub.gated else self.send(b"{}", {}, body=body)
        if match := re.fullmatch(rf"/{self.hub.repo}/resolve/[^/]+/(.+)", path):
            if self.hub.gated:
                return self.forbid()
            return self.file(match.group(1), body=body)
        return self.refuse(404, "RepoNotFound", "Repository Not Found")

    def forbid(self) -> None:
        given = "Authorization" in self.headers
        self.refuse(403 if given else 401, "GatedRepo", f"Access to model {self.hub.repo} is restricted")

    def info(self) -> object:
        def row(path: str, content: Content) -> object:
            size = size_of(content)
            lfs = {"sha256": sha256(content), "size": size, "pointerSize": 130} if large(path) else None
            blob = git_id(content) if isinstance(content, bytes) else git_id(sha256(content).encode())
            return {"rfilename": path, "size": size, "blobId": blob, **({"lfs": lfs} if lfs else {})}

        return {
            "id": self.hub.repo,
            "sha": COMMIT,
            "gated": "manual" if self.hub.gated else False,
            "siblings": [row(path, content) for path, content in self.hub.files.items()],
        }

    def file(self, path: str, *, body: bool) -> None:
        content = self.hub.files.get(path)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{sha256(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if body and self.hub.corrupt.get(path, 0) > 0 and isinstance(content, bytes):
            self.hub.corrupt[path] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send(content, headers, body=body, path=path)

    def send(self, content: Content, headers: dict[str, str], *, body: bool, path: str | None = None) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(size_of(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        agent = re.search(r"node/([^;\s]+)", self.headers.get("User-Agent", ""))
        node = agent.group(1) if agent else "?"
        try:
            for block in blocks(content):
                if path:
                    self.hub.wait_turn(node, len(block))
                    if self.abandoned():
                        self.close_connection = True
                        return
                self.wfile.write(block)
        except OSError:
            self.close_connection = True
            return
        if path:
            self.hub.served[node].append(path)

    def abandoned(self) -> bool:
        """Whether the client has closed the connection. A small write would still succeed, and be counted as a download."""
        with suppress(BlockingIOError):
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False

    def refuse(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": message}).encode()
        self.send_response(status)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(files: Mapping[str, Content], *, host: str = "127.0.0.1", port: int = 0, **behaviour: Any) -> Iterator[Hub]:
    """Serve a Hub with `files` within the block."""
    hub = Hub(files=files, **behaviour)
    server = _Server((host, port), hub)
    hub.url = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearsal.hub", description="Serve a Hub with one small Llama.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--repo", default="rehearsal/Llama-405B-in-small")
    parser.add_argument("--files", type=int, default=191)
    parser.add_argument("--folder", type=Path, help="Serve the files of this folder instead.")
    parser.add_argument("--gated", action="store_true")
    given = parser.parse_args()
    files = of_folder(given.folder) if given.folder else llama(given.files)
    with serving(files, host=given.host, port=given.port, repo=given.repo, gated=given.gated) as hub:
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
