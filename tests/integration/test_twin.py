"""The twin of an aarch64 wheel: real nvcc gives it the device code that it gives the aarch64 wheel."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from builder.audit import device_digest
from builder.planning.plan import TWIN
from builder.planning.stack import Arch
from tests.conftest import Farm
from tests.integration.test_device_store import HOST_ONLY, made

KERNELS = {"bool": "*x = flag ? 2 : 3;", "char": "*x = flag / 2;"}
PLAIN = "/toolchain/nvidia/cu13/bin/nvcc"
"nvcc as in a host build: device.py, which makes code for `bool` equal on both architectures, does not run its passes."


@HOST_ONLY
@pytest.mark.parametrize("kind", KERNELS)
def test_the_device_code_is_that_of_aarch64_only_with_the_options_of_a_twin(farm: Farm, tmp_path: Path, kind: str) -> None:
    bed = made(farm, tmp_path, Arch.AARCH64, Arch.X86_64)
    bed.write(unit_cu=f"__global__ void kernel(int *x, {kind} flag) {{ {KERNELS[kind]} }}\n")
    (mount,) = [mount for mount in bed.boxes[Arch.X86_64].mounts if mount.target == "/toolchain"]
    (reader,) = mount.source.glob("nvidia/*/bin/cuobjdump")

    def digests(content: bytes) -> dict[str, str]:
        with zipfile.ZipFile(place := tmp_path / "thing-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("thing.so", content)
        return device_digest.of_wheel(place, reader)

    wanted = digests(bed.compile())
    assert list(wanted) == ["90"]
    assert digests(bed.compile(target=Arch.X86_64, nvcc=PLAIN)) != wanted
    assert digests(bed.compile(target=Arch.X86_64, nvcc=PLAIN, NVCC_APPEND_FLAGS=TWIN)) == wanted
    # In the sandbox, the store has this code already.
    assert digests(bed.compile(target=Arch.X86_64, NVCC_APPEND_FLAGS=TWIN)) == wanted
    assert bed.outcomes() == ["nvvm", "ptx"]
