"""A simulated engine for the tests of the step `engine`: log lines and port like the real engine, without Ray and a model.

    python pretend_engine.py --port N [--load S] [--stay FILE] [--die CODE] [--wedge FILE] [--say FILE]

Like the original, it refuses connections while it loads, always answers /health with 200, and requires the key of
APHRODITE_API_KEY. With --wedge FILE, completions hang while FILE exists.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKENS = [0]


def handler(options: argparse.Namespace) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - it has one class with few answers
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(200, {})
            elif self.path == "/metrics":
                self.text(
                    f'aphrodite:generation_tokens_total{{model_name="m"}} {float(TOKENS[0])}\n'
                    'aphrodite:num_requests_running{model_name="m"} 0.0\n'
                )
            elif self.allowed():
                self.answer(200, {"data": [{"id": "org/model"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if not self.allowed():
                return
            while options.wedge and Path(options.wedge).exists():
                if options.busy:
                    TOKENS[0] += 1
                time.sleep(0.05)
            TOKENS[0] += 1
            self.answer(200, {"choices": [{"text": "!"}], "usage": {"completion_tokens": 1}})

        def allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {os.environ['APHRODITE_API_KEY']}":
                return True
            self.answer(401, {"error": "Unauthorized"})
            return False

        def answer(self, status: int, value: object) -> None:
            self.text(json.dumps(value), status)

        def text(self, text: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--die", type=int)
    parser.add_argument("--say")
    parser.add_argument("--stay", help="stop the loading at 25 %% while this file exists")
    parser.add_argument("--wedge")
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    say("INFO:     Initializing Aphrodite Engine (v0.6.4.post1) with the following config:")
    say("INFO:     use_ray_spmd_worker: False")
    for percent in range(0, 101, 25):
        say(f"\x1b[36mLoading model weights...\x1b[0m ━━━━ {percent}% {percent * 7.56:.2f}/756.00 GiB 0:00:01")
        time.sleep(options.load / 5)
        while percent == 25 and options.stay and Path(options.stay).exists():
            time.sleep(0.05)
    if options.die is not None:
        say(Path(options.say).read_text() if options.say else "it ends")
        sys.exit(options.die)
    say("INFO:     Model weights loaded in 1.00 seconds.")
    say("INFO:     # GPU blocks: 4251, # CPU blocks: 512")
    server = ThreadingHTTPServer(("127.0.0.1", options.port), handler(options))
    server.daemon_threads = True
    say("INFO:     Completions API:  http://127.0.0.1/v1/completions")
    server.serve_forever(0.05)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
