"""What builds a wheel: the kinds of toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.planning.plan import Toolchain
from builder.planning.recipe import ToolchainKind
from builder.toolchains.container import ContainerToolchain
from builder.toolchains.host import HostToolchain
from builder.toolchains.sandbox import SandboxToolchain

KINDS: Mapping[ToolchainKind, type[Toolchain]] = {
    kind.kind: kind for kind in (SandboxToolchain, HostToolchain, ContainerToolchain)
}
"Every kind, by its name on the command line and in records."


def of_inputs(inputs: Mapping[str, Any]) -> type[Toolchain]:
    """The kind of an earlier build with these inputs; the sandbox alone adds none of its own."""
    return KINDS[inputs.get("toolchain", {}).get("kind", "sandbox")]
