"""recipes/flash_attn_cu130/smoke.py as it is, on modules that only have what it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.planning import local_version, recipe
from tests.conftest import REPOSITORY

RECIPE = recipe.load(REPOSITORY / "recipes", "flash_attn_cu130")
MODULES = {
    "flash_attn.py": "__version__ = '2.8.3'",
    "flash_attn_2_cuda.py": "fwd = varlen_fwd = bwd = varlen_bwd = fwd_kvcache = None",
    "torch.py": "class version: cuda = '13.0'",
}


def smoke(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    for name, text in MODULES.items():
        (folder / name).write_text(text)
    metadata = folder / f"flash_attn-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n")
    script = REPOSITORY / "recipes/flash_attn_cu130/smoke.py"
    variables = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("torch", ["2.11.0", "2.14.0"])
def test_it_accepts_the_local_version_that_the_builder_writes(tmp_path: Path, torch: str) -> None:
    # A machine with a GPU refused a wheel that had passed every gate: the script knew only the recipe's version.
    ended = smoke(tmp_path, local_version.named(RECIPE.data.version, "13.0", torch))
    assert ended.returncode == 0, ended.stderr


def test_it_refuses_a_wheel_that_does_not_say_that_kernels_are_missing(tmp_path: Path) -> None:
    ended = smoke(tmp_path, local_version.named("2.8.3", "13.0", "2.11.0"))
    assert ended.returncode != 0
    assert "AssertionError: 2.8.3+cu130.torch2.11" in ended.stderr
