"""Shared code of the tests of `--toolchain container`: a stack with an image, and the search for a container engine."""

from __future__ import annotations

import json

from builder.planning import stack
from builder.planning.plan import Wanted
from builder.planning.stack import host_arch
from builder.toolchains.container import ContainerToolchain
from tests.conftest import REPOSITORY, Farm

HERE = host_arch()


def with_image(farm: Farm, sha256: str, **more: str) -> None:
    """Add an image to the stack `bare`."""
    place = farm.settings.project / "stacks/bare/stack.toml"
    own = {"name": "localhost/farm", "tag": "one", "sha256": sha256, **more}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in own.items())
    place.write_text(f"{place.read_text()}\n[container.{HERE.value}]\n{lines}")


def find() -> ContainerToolchain:
    """Find a container engine and cibuildwheel. The search does not depend on the stack."""
    return ContainerToolchain.find(stack.load(REPOSITORY / "stacks", "cu130"), Wanted(), cuda=False)
