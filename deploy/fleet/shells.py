"""Converts the nodes of a fleet to RemoteNode. `calls.call` runs functions on these over connections of deploy.fleet.ssh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploy.fleet.calls import Exit, RemoteNode
from deploy.fleet.jobs import follow_job, job_status, start_job
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from deploy.nodes.facts import Facts


@dataclass(frozen=True)
class FleetShell:
    """Runs commands on one node of a fleet."""

    fleet: Fleet
    node: Node

    async def stream(self, command: str, *, stdin: bytes, on_line: Callable[[str], None]) -> Exit:
        """Run a command. Raises SshError if the node cannot be reached, and NodeError if the connection is lost."""

        def line(_node: Node, stream: str, text: str) -> None:
            if stream == "stdout":
                on_line(text)

        result = (await self.fleet.run(command, nodes=[self.node], input=stdin, on_line=line, keep=False))[self.node.name]
        if result.error:
            raise result.error
        assert result.returncode is not None
        return Exit(code=result.returncode, stderr=result.stderr)

    async def start(self, job: str, command: str, *, stdin: bytes) -> bool:
        """Start a detached job with this deployment's mark."""
        return await start_job(self.fleet, self.node, job, command, input=stdin)

    async def follow(self, job: str, on_line: Callable[[str], None]) -> Exit:
        """Follow the log of a job until it ends. The exit code of a killed job is -1."""
        status = await follow_job(self.fleet, self.node, job, on_line, patience=self.fleet.patience)
        if status.returncode is None:
            return Exit(code=-1, stderr="it was stopped" if status.state == "stopped" else "it was killed")
        return Exit(code=status.returncode, stderr="")

    async def at_work(self, job: str) -> bool:
        """Whether the job is running."""
        return (await job_status(self.fleet, self.node, job)).state == "running"


def remote_nodes(fleet: Fleet, facts: Facts | None = None, nodes: Sequence[Node] | None = None) -> list[RemoteNode]:
    """The nodes as RemoteNode. Without facts, use the address for ssh and the number of GPUs of deploy.toml."""
    known: Mapping[str, tuple[str, int]] = {
        node_facts.name: (node_facts.private, len(node_facts.cuda.gpus)) for node_facts in (facts.nodes if facts else ())
    }
    remote_nodes = []
    for node in fleet.nodes if nodes is None else nodes:
        address, gpus = known.get(node.name, (node.address, 0))
        shell, mark = FleetShell(fleet, node), f"{fleet.mark}/{node.name}"
        remote_nodes.append(RemoteNode(name=node.name, address=address, gpus=node.gpus or gpus, shell=shell, mark=mark))
    return remote_nodes
