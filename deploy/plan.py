"""The plan: what runs, where, with which environment. What it prints is what `deploy serve` executes, argument by argument."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from deploy.layout import Layout


class NodePlan(BaseModel):
    """One node's part. The command of its Ray, exactly; it ends when Ray runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    address: str
    "As ssh reaches it."
    private: str
    "As the other nodes reach it: Ray's node address and the engine's host address."
    interface: str
    gpus: PositiveInt
    "GPUs that Ray is told of: the plan's tp * pp in all, never more."
    env: Mapping[str, str]
    "Of `ray start`: Ray's workers have no other environment."
    ray: tuple[str, ...]
    "Arguments of `ray start`."


class Plan(BaseModel):
    """A deployment, planned. Equal input gives an equal id, any other input another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    "sha256 over all the rest as canonical JSON."
    deployment: str
    engine: Literal["aphrodite", "vllm"]
    model: str
    "Repository on the Hub."
    revision: str
    "Commit; a branch where it was not resolved yet."
    layout: Layout
    nodes: tuple[NodePlan, ...]
    "In the engine's rank order, the head first."
    spares: tuple[str, ...] = ()
    "Names of nodes that Ray must not know of."
    serve: tuple[str, ...]
    "Arguments of the engine, on the head, listening on 127.0.0.1."
    serve_env: Mapping[str, str]
    "Its whole environment beside the login's."
    secret_env: tuple[str, ...]
    "Names of variables whose values are secret: `deploy serve` hands them over on stdin."

    @property
    def head(self) -> NodePlan:
        """Where Ray's head and the engine's driver run."""
        return self.nodes[0]


def identified(plan: Plan) -> Plan:
    """The plan with its id."""
    rest = plan.model_dump(mode="json", exclude={"id"})
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return plan.model_copy(update={"id": hashlib.sha256(text.encode()).hexdigest()})
