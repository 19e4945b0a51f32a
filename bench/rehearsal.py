"""Compares a rehearsal with ten nodes, until it is ready, with the same steps by hand: one `ssh … ray start` after the other.

python -m bench rehearsal                  with ten nodes
NODES=3 python -m bench rehearsal          with three nodes
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.rehearsal import walkthrough
from deploy.rehearsal.rig import USER
from deploy.rehearsal.walkthrough import Rehearsal
from gracefarm import settings
from gracefarm.console import Console

COMPLETION = """
import json, sys, urllib.request
body = json.dumps({"model": sys.argv[1], "prompt": "x", "max_tokens": 1}).encode()
request = urllib.request.Request("http://127.0.0.1:2242/v1/completions", body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=30).status)
"""
LIMIT, UP_LIMIT = 1.3, 5.0
"The bounds of issue 5: time of `serve` / time by hand; seconds of an `up` when all steps are done."


@dataclass
class Times:
    """The seconds of each step, by name and in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a step, and store its time. Return the result of the step."""
        begin = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - begin
        return result


def ssh(rehearsal: Rehearsal, address: str, command: str) -> None:
    """Run a command on a node with `ssh`, as a user would type it. The host keys are pinned."""
    known = rehearsal.folder / ".deploy" / "known_hosts"
    line = [
        "ssh",
        "-F",
        "none",
        "-i",
        str(rehearsal.room.key),
        "-o",
        f"UserKnownHostsFile={known}",
        f"{USER}@{address}",
        command,
    ]
    subprocess.run(
        rehearsal.room.command(line), check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180
    )


def by_hand(rehearsal: Rehearsal, plan: dict[str, Any], times: Times) -> None:
    """Run the plan's commands on one node after the other, without a token, marks and checks."""

    def typed(env: dict[str, str], argv: list[str]) -> str:
        mine = {key: value for key, value in env.items() if not key.startswith("RAY_AUTH")}
        return " ".join([f"{key}={shlex.quote(value)}" for key, value in mine.items()] + [shlex.join(argv)])

    def ray() -> None:
        for node in plan["nodes"]:
            ssh(rehearsal, node["address"], typed(node["env"], node["ray"]))

    def engine() -> None:
        head = rehearsal.room.nodes[0]
        line = typed(plan["serve_env"], plan["serve"])
        ssh(rehearsal, head.address, f"(setsid env {line} > /tmp/by-hand.log 2>&1 < /dev/null &) > /dev/null 2>&1")
        deadline = time.monotonic() + 300
        while head.execute(["python3", "-c", COMPLETION, plan["model"]]).returncode:
            if time.monotonic() > deadline:
                raise SystemExit((head.tmp / "by-hand.log").read_text()[-2000:])
            time.sleep(0.5)

    times.take("ray", ray)
    times.take("engine", engine)
    ray_program = plan["nodes"][0]["ray"][0]
    for node in rehearsal.room.nodes:
        # The shell has this pattern in its arguments. With the brackets, the pattern does not match the shell.
        ssh(rehearsal, node.address, f"pkill -f 'env/bin/[a]phrodite run'; {ray_program} stop --force")


def served(output: str) -> dict[str, float]:
    """The seconds of the engine's start, from the output of `deploy serve --json`."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"ready"'):
            return {"engine": float(json.loads(line)["seconds"])}
    return {}


def main() -> None:
    """Measure, and print the table."""
    count = int(os.environ.get("NODES", "10"))
    here, console = settings.load(), Console()
    tool, hand = Times(), Times()
    with walkthrough.rehearsal(count, here.home, here, console) as rehearsal:
        tool.take("init, plan", lambda: walkthrough.start(rehearsal))
        tool.take("up", lambda: rehearsal.command("up"))
        tool.take("up again", lambda: rehearsal.command("up"))
        plan = json.loads(rehearsal.command("plan", "--json").output.splitlines()[-1])
        by_hand(rehearsal, plan.get("plan", plan), hand)
        step = tool.take("serve", lambda: rehearsal.command("serve", "--skip-up", "--json"))
        rehearsal.command("down")
    engine = served(step.output).get("engine", 0.0)
    whole, hands = tool.seconds["serve"], hand.seconds["ray"] + hand.seconds["engine"]
    print(f"\n{count} nodes of this machine ({os.cpu_count()} cores)\n")
    print("| step | by hand, s | deploy, s |")
    print("|---|---|---|")
    print(f"| init, plan | | {tool.seconds['init, plan']:.1f} |")
    print(f"| up: preflight, environments, weights, proof | | {tool.seconds['up']:.1f} |")
    print(f"| up again, all steps done (at most {UP_LIMIT:g}) | | {tool.seconds['up again']:.1f} |")
    print(f"| Ray on all nodes | {hand.seconds['ray']:.1f} | {whole - engine:.1f} |")
    print(f"| engine, to a completion | {hand.seconds['engine']:.1f} | {engine:.1f} |")
    print(f"| Ray and engine (at most {LIMIT:g} times) | {hands:.1f} | {whole:.1f}: {whole / hands:.2f} times |")


if __name__ == "__main__":
    main()
