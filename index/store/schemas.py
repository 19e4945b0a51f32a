"""Schemas of the documents besides records: the cells of a matrix, and the certificate of a GPU.

pydantic is slow to import, so the server imports this module only to read a document.
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
InterpreterName = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,127})?$")]
SmName = Annotated[str, StringConstraints(pattern=r"^[0-9]{2,3}[a-z]?$")]
DeviceDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WheelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,250}\.whl$")]
CellState = Literal["built", "served", "running", "failed", "blocked", "not tried"]
CellTarget = Literal["aarch64", "x86_64"]

MAX_CELLS = 100_000


class SentDocument(BaseModel):
    """Unknown keys stay in the document and are not shown."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class MatrixCell(SentDocument):
    """One cell. Each cell is one wheel."""

    recipe: RecipeName
    "Name of the recipe."
    version: ShortText = ""
    "Version of the package, for example 1.7.0."
    stack: RecipeName
    "Name of the stack."
    torch: ShortText = ""
    "Version of the stack's torch, for example 2.11.0. Empty: the recipe does not use CUDA, or the stack has no torch."
    cuda: ShortText = ""
    "Version of CUDA, for example 13.0. Empty: the recipe does not use CUDA."
    python: CellPython
    "Version of Python, for example 3.13. 3.14t is the free-threaded build."
    interpreter: InterpreterName = ""
    (
        "Name of the interpreter on the build machine, for example 3.13-trixie. `root`: the Python of the stack. Empty: "
        "unknown. The page `/board/` then shows the value of `python` instead."
    )
    target: CellTarget
    "Architecture of the wheel."
    sm: tuple[SmName, ...] = Field(default=(), max_length=64)
    "sm values, for example 90, 90a and 100f. Empty: the recipe does not use CUDA."
    state: CellState
    (
        "State of the cell. `built`: the build succeeded. `served`: the wheel of another cell also works for this cell. "
        "`running`: the build is running. `failed`: the last build failed or was interrupted. `blocked`: the cell cannot be "
        "built now. `not tried`: no build was started."
    )
    build_id: BuildId | None = None
    "Build id. null: unknown, because the cell is blocked."
    wheel: WheelName | None = None
    "File name of the wheel. null: there is no wheel."
    reason: str = ""
    (
        "Explanation of the state. `failed`: the error. `blocked`: the cause. `served`: the wheel that also works for this "
        "cell. `not tried`: the hosts from which the build would fetch files. The page `/board/` shows the first 2,000 "
        "characters of this text."
    )
    cpu_seconds: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)
    "CPU seconds of the build. For `built`, the value is measured. For other states, it is estimated. null: unknown."
    disk_bytes: int | None = Field(default=None, ge=0, lt=10**15)
    "Disk space of the build, in bytes. It is measured or estimated like `cpu_seconds`. null: unknown."
    estimate: ShortText = ""
    (
        "Source of the estimates in `cpu_seconds` and `disk_bytes`, for example `estimated from a build for target x86_64`. "
        "The text names only the properties in which the other build differs from the cell. Empty: no value is estimated."
    )


class MatrixDocument(SentDocument):
    """Body of `PUT /matrix/NAME`: the cells that a selector names."""

    name: DocumentName
    "Name of the matrix. It must be equal to NAME in the address."
    selector: str = ""
    "Selector of the cells, for example `python=3.10..3.14 stack=cu130,cu132 target=aarch64`."
    made: AwareDatetime
    "Time at which the document was made (ISO 8601, with time zone)."
    cells: tuple[MatrixCell, ...] = Field(max_length=MAX_CELLS)
    "The cells."

    def projects(self) -> set[str]:
        """Normalised projects of the cells' recipes."""
        return {str(canonicalize_name(name)) for name in {cell.recipe for cell in self.cells}}


class GpuComparison(SentDocument):
    """A result that the wheel computed on a GPU, compared with a reference."""

    name: ShortText
    "Name of the result, for example `forward float16`."
    error: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)
    "Largest difference from the reference. null: unknown."
    tolerance: float | None = Field(default=None, ge=0, lt=1e15, allow_inf_nan=False)
    "Largest difference that is accepted. null: unknown."


class CertifiedWheel(SentDocument):
    """The wheel that ran on the GPU."""

    filename: WheelName
    "File name of the wheel."
    sha256: DeviceDigest
    "sha256 of the wheel."


class DeviceCertificate(SentDocument):
    """Body of `PUT /certificates/DIGEST`: device code whose results on a GPU match a reference."""

    device_digest: DeviceDigest
    "Digest of the wheel's device code for one sm value. It must be equal to DIGEST in the address."
    sm: SmName
    "sm value of the device code, for example `90`."
    other_sm: tuple[SmName, ...] = Field(default=(), max_length=100)
    (
        "Other sm values for which the tested wheel has device code that this GPU can run. If the list is not empty, it is "
        "not known whether the comparisons ran code for `sm`."
    )
    gpu: ShortText
    "Name of the GPU, for example `NVIDIA H100 80GB HBM3`."
    driver: ShortText = ""
    "Version of NVIDIA's driver. Empty: unknown."
    certified: AwareDatetime
    "Time of the test (ISO 8601, with time zone)."
    wheel: CertifiedWheel
    "The tested wheel."
    comparisons: tuple[GpuComparison, ...] = Field(default=(), max_length=1000)
    "Results that were compared with a reference."
