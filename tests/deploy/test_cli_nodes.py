"""`deploy run` and `deploy ssh` as processes, on nodes that are SSH servers of this test."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from deploy.cli.nodes import arguments
from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment, Node, load_deployment
from tests.deploy import kit


def prepared(folder: Path, made: list[kit.Machine]) -> Deployment:
    """deploy.toml with the machines, two of them in their own group, and their keys pinned."""
    lines = ['name = "t"', f'local = "{folder}/local"', "[nodes]", 'user = "tester"', "[options]", "connect_timeout = 5"]
    for machine in made:
        lines += ["[[node]]", f'address = "{machine.node.address}"', f"port = {machine.node.port}"]
        lines += ['group = "far"'] if machine.node.rank else []
    (folder / "deploy.toml").write_text("\n".join(lines) + "\n")
    found = load_deployment(folder / "deploy.toml")
    found.folder.make()
    shutil.copy(folder / "known_hosts", found.folder.known_hosts)
    return found


def with_nodes(folder: Path, count: int, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each `deploy COMMAND`."""

    async def go() -> list[tuple[int, str, str]]:
        found = []
        async with kit.machines(folder, count) as made:
            prepared(folder, made)
            for words in commands:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "deploy", "--file", str(folder / "deploy.toml"), *words),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
                out, err = await process.communicate()
                assert process.returncode is not None
                found.append((process.returncode, out.decode(), err.decode()))
        return found

    return asyncio.run(go())


def test_each_line_has_its_node_and_each_bad_exit_code_is_told(tmp_path: Path) -> None:
    everywhere, rest, words, bad, machine = with_nodes(
        tmp_path,
        3,
        ("run", "--", "echo at ${HOME##*-}; echo oops >&2"),
        ("run", "-k", "rest", "--", "echo ${HOME##*-}"),
        ("run", "-k", "0,far", "--", "printf", "%s\n", "two words"),
        ("run", "--", "exit ${HOME##*-k}"),
        ("run", "-k", "k1", "--json", "--", "echo x; exit 7"),
    )
    assert everywhere[0] == 0
    assert sorted(everywhere[1].splitlines()) == ["k0 at k0", "k1 at k1", "k2 at k2"]
    assert sorted(everywhere[2].splitlines()) == ["k0 oops", "k1 oops", "k2 oops"]
    assert sorted(rest[1].splitlines()) == ["k1 k1", "k2 k2"]
    assert sorted(words[1].splitlines()) == ["k0 two words", "k1 two words", "k2 two words"]
    assert bad[0] == 61
    assert "exit code 1 on k1; exit code 2 on k2; 0 on k0" in bad[2]
    assert machine[0] == 61
    events = [json.loads(line) for line in machine[1].splitlines()]
    assert events[0] == {"event": "line", "text": "x", "node": "k1", "stream": "stdout"}
    assert events[1]["k1"]["returncode"] == 7
    assert events[-1]["exit_code"] == 61


def test_words_that_name_no_node_are_told_before_anybody_is_entered(tmp_path: Path) -> None:
    ((code, _out, err),) = with_nodes(tmp_path, 1, ("run", "-k", "k9", "--", "true"))
    assert code == 2
    assert "no node 'k9'" in err


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is missing on this machine")
def test_the_systems_ssh_trusts_the_pinned_keys_alone(tmp_path: Path) -> None:
    async def go() -> list[tuple[int | None, str]]:
        found = []
        async with kit.machines(tmp_path, 2) as made:
            deployment = prepared(tmp_path, made)
            text = deployment.folder.known_hosts.read_text().splitlines()
            keys = [line.split(" ", 1) for line in text]
            swapped = f"{keys[0][0]} {keys[1][1]}\n{keys[1][0]} {keys[1][1]}\n"
            for known in ("\n".join(text) + "\n", swapped):
                deployment.folder.known_hosts.write_text(known)
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "deploy", "--file", str(deployment.path), "ssh", "k0", "--", "echo $HOME"),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                out, _ = await process.communicate()
                found.append((process.returncode, out.decode()))
        return found

    good, other = asyncio.run(go())
    assert good == (0, f"{tmp_path}/home-k0\n")
    assert other[0] == 255
    assert "Host key verification failed" in other[1]


def test_key_port_user_and_jump_host_go_to_ssh_as_arguments(tmp_path: Path) -> None:
    node = Node(
        name="k0", rank=0, address="10.0.0.1", port=2222, user="u", key=Path("/keys/one"), jump="door@gate.example:2200"
    )
    deployment = Deployment(path=tmp_path / "deploy.toml", data=Config(), nodes=(node,))
    found = arguments(deployment, node)
    known = tmp_path / ".deploy" / "known_hosts"
    assert found[:6] == [
        *("-o", f"UserKnownHostsFile={known}"),
        *("-o", "GlobalKnownHostsFile=/dev/null"),
        *("-o", "StrictHostKeyChecking=yes"),
    ]
    assert found[-3:] == ["-i", "/keys/one", "u@10.0.0.1"]
    proxy = found[found.index("-p") + 3]
    assert proxy.startswith("ProxyCommand=ssh -o ")
    assert "-i /keys/one -p 2200 -W [%h]:%p door@gate.example" in proxy
    assert "StrictHostKeyChecking=yes" in proxy
