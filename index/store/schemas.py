"""Schemas of the documents that are put beside records: the cells of a matrix, and a GPU's certificate.

pydantic takes a while to import, so what serves installers imports this module only where a document is read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from packaging.utils import canonicalize_name
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

ShortText = Annotated[str, StringConstraints(max_length=200)]
RecipeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
DocumentName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]
BuildId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
CellPython = Annotated[str, StringConstraints(pattern=r"^3\.[0-9]{1,2}t?$")]
SmName = Annotated[str, StringConstraints(pattern=r"^[0-9]{2,3}[a-z]?$")]
DeviceDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WheelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,250}\.whl$")]
CellState = Literal["built", "failed", "blocked", "not tried"]
CellTarget = Literal["aarch64", "x86_64"]

MAX_CELLS = 100_000


class SentDocument(BaseModel):
    """Keys that the schema does not name are kept in the document and not shown."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class MatrixCell(SentDocument):
    """One cell: recipe x stack x Python x target x sm list, which is one wheel."""

    recipe: RecipeName
    version: ShortText = ""
    "Of the recipe's project, as 1.7.0."
    stack: RecipeName
    torch: ShortText = ""
    "As 2.11.0; empty where the wheel does not depend on it."
    cuda: ShortText = ""
    "As 13.0; empty for a wheel without device code."
    python: CellPython
    "As 3.13, or 3.14t for the free-threaded one."
    target: CellTarget
    sm: tuple[SmName, ...] = Field(default=(), max_length=64)
    "As 90, 90a, 100f."
    state: CellState
    build_id: BuildId | None = None
    wheel: WheelName | None = None
    "File name of the wheel, once it is built."
    reason: str = ""
    "The first error of a failed cell; what blocks a blocked one. The board shows its first 2,000 characters."
    cpu_seconds: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)
    "CPU seconds that the cell took, or is expected to need."
    disk_bytes: int | None = Field(default=None, ge=0, lt=10**15)
    "Bytes of disk that the build took, or is expected to need."


class MatrixDocument(SentDocument):
    """What `PUT /matrix/NAME` takes: the cells that a selector names."""

    name: DocumentName
    "The NAME of the address."
    selector: str = ""
    "As 'python=3.10..3.14 stack=cu130,cu132 target=aarch64'."
    made: AwareDatetime
    "When the cells were listed."
    cells: tuple[MatrixCell, ...] = Field(max_length=MAX_CELLS)

    def projects(self) -> set[str]:
        """Normalised projects of the cells' recipes."""
        return {str(canonicalize_name(name)) for name in {cell.recipe for cell in self.cells}}


class GpuComparison(SentDocument):
    """One result that a GPU computed with the wheel, compared with a reference."""

    name: ShortText
    error: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)
    "The largest difference found."
    tolerance: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)


class CertifiedWheel(SentDocument):
    """The wheel that ran on the GPU."""

    filename: WheelName
    sha256: DeviceDigest


class DeviceCertificate(SentDocument):
    """What `PUT /certificates/DIGEST` takes: device code that computed right numbers on a GPU."""

    device_digest: DeviceDigest
    "The DIGEST of the address: the wheel's device code for one sm."
    sm: SmName
    gpu: ShortText
    "As NVIDIA H100 80GB HBM3."
    driver: ShortText = ""
    certified: AwareDatetime
    wheel: CertifiedWheel
    comparisons: tuple[GpuComparison, ...] = Field(default=(), max_length=1000)
