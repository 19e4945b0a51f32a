"""A small OpenAI-compatible server for the tests of `deploy bench`. It uses real HTTP, and is as difficult as real servers.

It sends several tokens in a chunk, a first chunk without text, lines of comments, and U+2028 in an answer. It splits its
stream at any place in a line. `faults` orders a fault for the n-th request.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """The behaviour of the server, and the requests so far."""

    key: str | None = None
    per_chunk: tuple[int, ...] = (1, 3, 2, 4)
    delay: float = 0.002
    "Seconds between tokens."
    before: float = 0.0
    "Seconds until the first token."
    usage: bool = True
    ignore_eos: bool = True
    "Whether the server accepts this field. Otherwise it answers with status 422, like servers without this field."
    faults: Mapping[int, str] = field(default_factory=dict)
    "From the number of a request (0 is the first) to its fault: `error`, `stall`, `cut` or `500`."
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Handles one connection."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour
    unanswered = False

    def do_GET(self) -> None:
        if self.allowed():
            self.whole(200, {"object": "list", "data": [{"id": "org/tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        mine = self.behaviour
        with mine.lock:
            fault = mine.faults.get(len(mine.requests), "")
            mine.requests.append({**body, "path": self.path})
            mine.at_once += 1
            mine.most_at_once = max(mine.most_at_once, mine.at_once)
        self.unanswered = True
        try:
            if "ignore_eos" in body and not mine.ignore_eos:
                self.whole(422, {"error": {"message": "Unexpected keys in the request: {'ignore_eos'}"}})
            elif fault == "500":
                self.whole(500, {"object": "error", "message": "background loop has errored"})
            else:
                self.stream(body, fault)
        except OSError:
            pass  # the client has disconnected
        finally:
            self.answered()

    def answered(self) -> None:
        """Stop counting the request as running. Call this before the last bytes, after which the client sends new requests."""
        mine = self.behaviour
        with mine.lock:
            mine.at_once -= self.unanswered
            self.unanswered = False

    def stream(self, body: dict[str, Any], fault: str) -> None:
        mine, chat = self.behaviour, "messages" in body
        wanted = body["max_tokens"] if body.get("ignore_eos") else min(body["max_tokens"], 10)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self.say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        time.sleep(mine.before)
        made, turn = 0, 0
        while made < wanted:
            count = min(mine.per_chunk[turn % len(mine.per_chunk)], wanted - made)
            time.sleep(mine.delay * count)
            text = f"to\u2028ken{made} " * count
            piece = {"delta": {"content": text}} if chat else {"text": text}
            self.say({"choices": [{"index": 0, **piece, "finish_reason": None}], "usage": None})
            made, turn = made + count, turn + 1
            if fault and made >= wanted / 2 and self.go_wrong(fault):
                return
        last = {"delta": {}} if chat else {"text": ""}
        self.say({"choices": [{"index": 0, **last, "finish_reason": "length"}], "usage": None})
        if mine.usage:
            prompt = len(str(body.get("prompt") or body.get("messages")).split())
            self.say({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": made}})
        self.answered()
        self.raw(b"data: [DO")
        self.raw(b"NE]\r\n\r\n")
        self.raw(b"")

    def go_wrong(self, fault: str) -> bool:
        if fault == "error":
            self.answered()
            self.say({"object": "error", "message": "Ray lost a worker", "type": "InternalServerError", "code": 500})
            self.raw(b"")
            return True
        if fault == "stall":
            for _ in range(100):  # send keep-alive chunks without text
                self.raw(b": ping\n\n")
                time.sleep(0.05)
        self.answered()
        self.close_connection = True
        return fault in ("cut", "stall")

    def say(self, chunk: dict[str, Any]) -> None:
        """Send a chunk like pydantic, which does not write ASCII only. Send it in two pieces, split at any place."""
        line = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        self.raw(line[:9])
        self.raw(line[9:])

    def raw(self, block: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        self.wfile.flush()

    def whole(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.answered()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        key = self.behaviour.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.whole(401, {"error": "Unauthorized"})
        return False

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def server(port: int = 0, **behaviour: Any) -> Iterator[tuple[str, Behaviour]]:
    """Run the server. Yields its address and its behaviour."""
    mine = Behaviour(**behaviour)
    made = ThreadingHTTPServer(("127.0.0.1", port), type("Mine", (Handler,), {"behaviour": mine}))
    made.daemon_threads = True
    made.block_on_close = False
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", mine
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
