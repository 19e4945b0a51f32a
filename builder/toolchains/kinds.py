"""All kinds of toolchain, by name."""

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
"All kinds, by their names on the command line and in records."


def of_inputs(inputs: Mapping[str, Any]) -> type[Toolchain]:
    """The kind of toolchain of an earlier build with these inputs; the sandbox is the one that adds no key."""
    return KINDS[inputs.get("toolchain", {}).get("kind", "sandbox")]
