"""Gate `wheel`: name, version and size are those of the recipe, and the metadata match the content.

https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from base64 import urlsafe_b64encode
from collections import Counter
from email.message import Message
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

from packaging.tags import Tag, parse_tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder.audit import dependence
from builder.audit.contents import UNREADABLE, Contents
from builder.audit.dependence import Dependence
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, passed, refused
from builder.planning import local_version
from builder.planning.stack import Arch
from gracefarm.errors import WheelError
from gracefarm.variants import split_label

GATE = "wheel"
UNRECORDED = ("RECORD", "RECORD.jws", "RECORD.p7s")
"Files of .dist-info for which RECORD requires no digest."


def only_wheel(folder: Path) -> Path:
    """The one wheel in a folder.

    Raises:
        WheelError: there is no wheel, or more than one (named).
    """
    match sorted(folder.glob("*.whl")):
        case [only]:
            return only
        case []:
            raise WheelError("the build left no wheel", remedy="see the output of the build backend in the log")
        case several:
            names = ", ".join(path.name for path in several)
            raise WheelError(
                f"the build left {len(several)} wheels instead of one: {names}",
                remedy="write a separate recipe for each wheel",
            )


def target_of(wheel: Path) -> Arch:
    """The architecture that a wheel's file name claims.

    Raises:
        WheelError: the name is not that of a wheel, or does not name exactly one supported architecture.
    """
    try:
        tags = parse_wheel_filename(split_label(wheel.name)[0])[3]
    except InvalidWheelFilename as error:
        raise WheelError(f"{wheel.name}: {error}", remedy="give the wheel its original name") from error
    archs = {arch for arch in Arch for tag in tags if tag.platform.endswith(f"_{arch.value}")}
    if len(archs) != 1:
        raise WheelError(
            f"{wheel.name} is for {' and '.join(sorted(archs)) or 'no supported architecture'}",
            remedy="audit wheels whose platform tag ends in _aarch64 or _x86_64",
        )
    return archs.pop()


def judge(wheel: Path, policy: Policy, contents: Contents | None = None) -> Verdict:
    """Check name, version, size, WHEEL, METADATA and RECORD. `contents` is None if the archive cannot be opened."""
    problems = _size(wheel, policy)
    try:
        name, version, _build, _tags = parse_wheel_filename(wheel.name)
        problems += _promise(name, version, policy, contents)
    except InvalidWheelFilename:
        pass  # `complaints` reports it
    problems += complaints(wheel)
    if problems:
        return refused(GATE, problems)
    return passed(GATE, f"{name} {version}, {_sized(wheel.stat().st_size)}; WHEEL, METADATA and RECORD agree with the content")


def complaints(wheel: Path) -> list[str]:
    """Contradictions between file name, WHEEL, METADATA, RECORD and content; empty if they agree."""
    try:
        name, version, _build, tags = parse_wheel_filename(wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            return _inside(archive, name, version, tags)
    except InvalidWheelFilename as error:
        return [f"the file name cannot be parsed: {error}"]
    except UNREADABLE as error:
        return [f"the archive cannot be read: {error}"]
    except (UnicodeDecodeError, csv.Error) as error:
        return [f"RECORD cannot be read: {error}"]


def _sized(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.1f} KiB"


def _size(wheel: Path, policy: Policy) -> list[str]:
    size = wheel.stat().st_size
    return (
        [f"the wheel has {_sized(size)}, which is more than the limit of {_sized(policy.max_size)}"]
        if size > policy.max_size
        else []
    )


def _promise(name: str, version: Version, policy: Policy, contents: Contents | None) -> list[str]:
    complaints = []
    if policy.name is not None and name != canonicalize_name(policy.name):
        complaints.append(f"the wheel's name is {name}, but the recipe has {canonicalize_name(policy.name)}")
    if policy.version is not None and not local_version.is_of(str(version), policy.version, policy.appends):
        complaints.append(f"the wheel has version {version}, but the recipe has {policy.version}")
    elif policy.version is not None and contents is not None:
        complaints += _local(version, policy.version, dependence.measure(contents, policy.target), policy)
    return complaints


def _local(version: Version, promised: str, measured: Dependence, policy: Policy) -> list[str]:
    """Compare the local part with the measured dependence: without a part, wheels of two stacks would have one name."""
    if measured.torch and policy.torch is None:
        return [f"{measured.torch[0]}, but the stack has no torch"]
    wanted = local_version.named(promised, policy.cuda if measured.cuda else None, policy.torch if measured.torch else None)
    if str(version) == wanted:
        return []
    reasons = "; ".join((*measured.cuda[:1], *measured.torch[:1])) or "it depends on neither CUDA nor torch"
    return [f"the wheel has version {version}, but its content requires version {wanted} ({reasons})"]


def _inside(archive: zipfile.ZipFile, name: str, version: Version, tags: frozenset[Tag]) -> list[str]:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    folders = sorted({top for top in (entry.partition("/")[0] for entry in names) if top.endswith(".dist-info")})
    complaints = [f"{entry} occurs {count} times in the archive" for entry, count in Counter(names).items() if count > 1]
    complaints += [f"{entry} leads out of the wheel" for entry in names if _leaves(entry)]
    if len(folders) != 1:
        return [*complaints, f"{len(folders)} .dist-info folders instead of one"]
    folder = folders[0]
    missing = [part for part in ("WHEEL", "METADATA", "RECORD") if f"{folder}/{part}" not in names]
    if missing:
        return [*complaints, f"{folder} has no {' and no '.join(missing)}"]
    complaints += _folder(folder, name, version)
    complaints += _metadata(_message(archive, f"{folder}/METADATA"), name, version)
    complaints += _wheel(_message(archive, f"{folder}/WHEEL"), tags)
    return complaints + _record(archive, folder, names)


def _leaves(entry: str) -> bool:
    return entry.startswith("/") or ".." in PurePosixPath(entry).parts


def _message(archive: zipfile.ZipFile, entry: str) -> Message:
    return BytesParser().parsebytes(archive.read(entry), headersonly=True)


def _folder(folder: str, name: str, version: Version) -> list[str]:
    stem = folder.removesuffix(".dist-info").split("-")
    if len(stem) == 2 and canonicalize_name(stem[0]) == name and _same(stem[1], version):
        return []
    return [f"the folder {folder} does not fit the file name"]


def _metadata(metadata: Message, name: str, version: Version) -> list[str]:
    complaints = []
    if canonicalize_name(str(metadata["Name"])) != name:
        complaints.append(f"METADATA has Name: {metadata['Name']}, but the file name has {name}")
    if not _same(str(metadata["Version"]), version):
        complaints.append(f"METADATA has Version: {metadata['Version']}, but the file name has {version}")
    return complaints


def _same(text: str, version: Version) -> bool:
    try:
        return Version(text) == version
    except InvalidVersion:
        return False


def _wheel(wheel: Message, tags: frozenset[Tag]) -> list[str]:
    complaints = []
    if not str(wheel["Wheel-Version"]).startswith("1."):
        complaints.append(f"WHEEL has Wheel-Version: {wheel['Wheel-Version']}, which installers refuse")
    inside = frozenset(tag for text in wheel.get_all("Tag", []) for tag in parse_tag(str(text)))
    if inside != tags:
        complaints.append(f"WHEEL has the tags {_tags(inside)}, but the file name has {_tags(tags)}")
    return complaints


def _tags(tags: frozenset[Tag]) -> str:
    return " ".join(sorted(str(tag) for tag in tags)) or "none"


def _record(archive: zipfile.ZipFile, folder: str, names: list[str]) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(archive.read(f"{folder}/RECORD").decode())) if row]
    recorded = {row[0]: row for row in rows}
    exempt = {f"{folder}/{part}" for part in UNRECORDED}
    counts = Counter(row[0] for row in rows)
    complaints = [f"{entry} occurs twice in RECORD" for entry, count in counts.items() if count > 1]
    complaints += [f"{entry} is in RECORD, but not in the wheel" for entry in recorded if entry not in names]
    for entry in dict.fromkeys(names):
        if entry in exempt:
            continue
        if entry not in recorded:
            complaints.append(f"{entry} is not in RECORD")
        elif not _digest_fits(archive, recorded[entry]):
            complaints.append(f"{entry} differs from RECORD")
    return complaints


def _digest_fits(archive: zipfile.ZipFile, row: list[str]) -> bool:
    """Check digest and size; algorithms weaker than sha256 are refused, as the specification requires."""
    entry, digest, size = (*row, "", "")[:3]
    algorithm, _, value = digest.partition("=")
    if algorithm not in ("sha256", "sha384", "sha512"):
        return False
    if size and size != str(archive.getinfo(entry).file_size):
        return False
    with archive.open(entry) as stream:
        computed = hashlib.file_digest(stream, algorithm).digest()  # type: ignore[arg-type] # a ZipExtFile has readinto
    return urlsafe_b64encode(computed).rstrip(b"=").decode() == value
