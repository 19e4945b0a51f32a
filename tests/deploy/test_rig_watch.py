"""What is seen of a deployment with real Ray and real sshd: while it serves, when a node is lost, and after its end."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import faultkit, nodefaults

pytestmark = [pytest.mark.root, pytest.mark.slow]


def status(made: Any) -> tuple[int, dict[str, Any]]:
    """`deploy status --json`."""
    done = faultkit.deploy(made, "status", "--json", "--canary", "10")
    return done.code, json.loads(done.output.splitlines()[-1])


def collected(made: Any, into: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """`deploy collect --json`, and what is in its bundle."""
    into.mkdir()
    said = json.loads(faultkit.well(made, "collect", "--json", "--into", str(into)).splitlines()[-1])
    with tarfile.open(said["path"]) as tar:
        members = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar.getmembers()}
        return said, {name: stream.read() for name, stream in members.items() if stream}


def test_seen_while_it_serves_when_a_node_is_lost_and_after_its_end(tmp_path: Path) -> None:
    price = "price_per_node_hour = 2.29"
    with faultkit.ready(2, options=price) as made:
        faultkit.well(made, "up")
        faultkit.well(made, "serve")
        code, seen = status(made)
        assert (code, seen["service"]["word"]) == (0, "READY")
        assert [(node["ray"], node["raylet"]) for node in seen["nodes"]] == [(True, True)] * 2
        assert "engine" in seen["nodes"][0]["jobs"]
        report = json.loads(
            faultkit.well(
                made, "bench", "--concurrency", "1,4", "--requests", "8", "--max-tokens", "64", "--json"
            ).splitlines()[-1]
        )
        assert report["to_the_end"]
        for level in report["levels"]:
            assert level["tokens"] == 8 * 64
            assert level["predicted_tokens_per_s"] > 0
            assert level["usd_per_mtok"] > 0
        moments = faultkit.well(made, "top", "--json", "--every", "1", "--count", "3").splitlines()
        counted = json.loads(moments[-1])["metrics"]["generation_tokens_total"]
        assert counted >= 2 * 8 * 64
        assert "k0 engine" in faultkit.well(made, "logs", "-n", "5")
        assert "k1 raylet.out" in faultkit.well(made, "logs", "k1", "-n", "3")
        said, _ = collected(made, tmp_path / "well")
        assert said["service"] == "READY"
        assert not [finding for finding in said["findings"] if finding["rank"] < 6]

        nodefaults.kill_matching(made.room["k1"], "raylet")
        deadline = time.monotonic() + 150
        while (found := status(made))[1]["service"]["word"] in ("READY", "WEDGED", "BUSY"):
            assert time.monotonic() < deadline, found
        code, seen = found
        assert code == 63
        assert seen["service"]["word"] in ("DEGRADED", "DEAD")
        assert [node["ray"] for node in seen["nodes"]] == [True, False]
        said, files = collected(made, tmp_path / "lost")
        assert "k1" in said["findings"][0]["text"]
        secrets = [(made.folder / ".deploy" / name).read_text().strip() for name in ("api-key", "ray-token")]
        for secret in (*secrets, faultkit.HF_TOKEN):
            assert not [name for name, content in files.items() if secret.encode() in content]
        assert any(name.startswith("nodes/k1/ray/session_") for name in files)
        assert files["summary.md"].decode().startswith("# rehearsal: D")

        faultkit.well(made, "down")
        code, seen = status(made)
        assert (code, seen["service"]["word"]) == (65, "STOPPED")
