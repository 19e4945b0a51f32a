"""Assumed nodes: `deploy plan --nodes 10 --gpu gh200-96` plans before any node is rented."""

from __future__ import annotations

from pathlib import Path

from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment, Folder, Node
from deploy.nodes.facts import Bytes, Cuda, Facts, Gpu, NodeFacts
from deploy.planning.hardware import NodeKind

MARK = "0" * 12
SHARE = "/shared"


class SupposedFolder(Folder):
    """The folder of an assumed deployment. Nothing is written to it. Its id is fixed: equal inputs give equal plans."""

    @property
    def id(self) -> str:
        """A placeholder for the id that `deploy init` creates."""
        return MARK


class Supposed(Deployment):
    """A deployment with assumed nodes, and deploy.toml or its defaults."""

    @property
    def folder(self) -> SupposedFolder:
        """The folder, which is never written to."""
        return SupposedFolder(path=self.path.parent / ".deploy")


def suppose(of: NodeKind, count: int, base: Deployment | None = None) -> tuple[Supposed, Facts]:
    """Assume `count` nodes of a kind, with the deploy.toml of `base` or its defaults. Return the deployment and its facts."""
    data = base.data if base else Config()
    options = data.options.model_copy(update={"rehearsal": False})
    data = data.model_copy(update={"share": data.share or SHARE, "options": options})
    nodes = tuple(Node(name=f"k{rank}", rank=rank, address=f"10.0.0.{rank + 1}") for rank in range(count))
    path = base.path if base else Path.cwd() / "deploy.toml"
    return Supposed(path=path, data=data, nodes=nodes), Facts(nodes=tuple(_facts(node, of) for node in nodes))


def _facts(node: Node, of: NodeKind) -> NodeFacts:
    memory = of.host_gib << 30
    gpu = Gpu(name=of.match, total=of.mib << 20, free=of.mib << 20)
    return NodeFacts(
        name=node.name,
        address=node.address,
        taken=0,
        user="ubuntu",
        hostname=node.name,
        arch=of.arch,
        kernel="",
        cores=64,
        python="3.11",
        glibc="2.35",
        glibcxx="3.4.30",
        page=of.page,
        memory=Bytes(total=memory, available=memory),
        cuda=Cuda(version=12040, gpus=(gpu,) * of.gpus),
        driver=None,
        private=node.address,
        interface="eth0",
        network="10.0.0.0/24",
        mounts=(),
        disk=None,
        clock_s=0,
    )
