"""Names of projects, distribution files, sets and views. Each has one valid spelling; others are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from packaging.tags import Tag
from packaging.utils import (
    InvalidName,
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from gracefarm import variants
from index.errors import NotFoundError, RefusedError

DistributionKind = Literal["bdist_wheel", "sdist"]

MAX_FILENAME = 255
"Maximum bytes of a file name on ext4, xfs and in tar."

_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]*\Z")
_SET_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?\Z")
_CUDA_VIEW = re.compile(r"cu(?:([1-9])(\d)|(\d{2})(\d{1,2}))(?:-torch(\d{1,3}\.\d{1,3}))?\Z")
_RESERVED = frozenset(
    (
        *("simple", "legacy", "files", "packages", "records", "nightly", "preview", "stage"),
        *("project", "wheel", "board", "sets", "set", "static", "health", "ready", "metrics", "changes"),
        *("matrix", "certificates", "cache", "openapi.json", "help", "search", "admin", "api", "favicon.ico", "robots.txt"),
    )
)

_PYTHON_TAG = re.compile(r"(py|cp|pp|ip|jy|graalpy)\d+\Z")
_ABI_TAG = re.compile(r"(none|abi3t?|(cp|pp|ip|jy|graalpy|pypy)\d+[a-z0-9_]*)\Z")
_ARCHES = "aarch64|x86_64|i686|armv7l|armv6l|ppc64le|ppc64|s390x|riscv64|loongarch64"
_PLATFORM_TAG = re.compile(
    rf"(any|linux_({_ARCHES})|manylinux(1|2010|2014|_\d+_\d+)_({_ARCHES})|musllinux_\d+_\d+_({_ARCHES})"
    r"|macosx_\d+_\d+_(arm64|x86_64|universal2|intel)|win32|win_(amd64|arm64))\Z"
)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The parts of a distribution file's name."""

    filename: str
    kind: DistributionKind
    project: str
    "Normalised (PEP 503)."
    version: str
    "Normalised (PEP 440), with the local part."
    tags: frozenset[Tag] = frozenset()
    variant: str = ""
    "The label of a variant wheel (PEP 825)."
    canonical: str
    "The canonical spelling of the file name. Two files with the same key are the same distribution."
    published: bool = False
    "Published elsewhere: the file is accepted as it is, and its defects are listed (see `index.intake.defects`)."

    @property
    def stem(self) -> str:
        """NAME-VERSION as the file name spells it: the .dist-info or top folder inside."""
        if self.kind == "sdist":
            return self.filename.removesuffix(".tar.gz").removesuffix(".zip")
        return "-".join(self.filename.split("-")[:2])


def normalise(name: str) -> str:
    """PEP 503 form of a project name.

    Raises:
        RefusedError: it is not a valid project name.
    """
    try:
        return str(canonicalize_name(name, validate=True))
    except InvalidName:
        raise RefusedError(
            f"{name!r} is not a project name",
            remedy="use letters, digits, '.', '_' and '-', with a letter or digit at both ends",
        ) from None


def name_in_address(text: str) -> str:
    """PEP 503 form of a project name in an address.

    Raises:
        NotFoundError: it is not a valid project name.
    """
    try:
        return normalise(text)
    except RefusedError as error:
        raise NotFoundError(error.cause, remedy="open the page / of this index, which lists the projects") from None


def same_version(text: str, version: str) -> bool:
    """Whether both spell the same version (PEP 440). False if one is not a version."""
    try:
        return Version(text) == Version(version)
    except ValueError:  # not a version, or one with more digits than Python converts
        return False


def parse_filename(filename: str, *, published: bool = False) -> Distribution:
    """Parse NAME-VERSION-TAGS[-VARIANT].whl or NAME-VERSION.tar.gz; only the canonical spelling is accepted.

    A file that was `published` elsewhere keeps its name.

    Raises:
        RefusedError: the name has another form; the remedy names the canonical spelling, if one exists.
    """
    check_plain(filename)
    if filename.endswith(".whl"):
        return _wheel(filename, published)
    if filename.endswith(".tar.gz"):
        return _sdist(filename, published)
    raise RefusedError(
        f"{filename} is neither a wheel nor an sdist",
        remedy="upload NAME-VERSION-TAGS.whl (PEP 427) or NAME-VERSION.tar.gz (PEP 625)",
    )


def parse_mirrored(filename: str) -> Distribution:
    """Parse the file name of a mirrored file. Sdists that are older than PEP 625 may also be zip archives.

    Raises:
        RefusedError: it is neither the name of a wheel nor of an sdist.
    """
    check_plain(filename)
    return _sdist(filename, published=True) if filename.endswith(".zip") else parse_filename(filename, published=True)


def check_plain(filename: str) -> None:
    """Check that a file name is one plain path segment, since exports and URLs contain it.

    Raises:
        RefusedError: it is not one plain path segment.
    """
    if not filename:
        raise RefusedError("the content field has no file name", remedy="send the file name of the distribution")
    if len(filename.encode("utf-8", "surrogatepass")) > MAX_FILENAME:
        raise RefusedError(
            f"the file name is longer than {MAX_FILENAME} bytes", remedy="shorten the local version or the build tag"
        )
    if not _FILENAME.match(filename):
        raise RefusedError(
            f"{filename!r} is not a plain file name",
            remedy="use a name that starts with a letter or digit and has only letters, digits and . _ + ! -",
        )


def _wheel(filename: str, published: bool) -> Distribution:
    plain, label = variants.split_label(filename)
    try:
        name, version, _build, tags = parse_wheel_filename(plain)
    except (InvalidWheelFilename, InvalidVersion) as error:
        raise RefusedError(
            f"{filename} is not a wheel's name: {error}", remedy="name the file NAME-VERSION-PYTHON-ABI-PLATFORM.whl (PEP 427)"
        ) from None
    if label and not variants.is_label(label):
        raise RefusedError(
            f"{filename}: {label!r} is not a variant label", remedy="use only the characters 0-9, a-z, '_' and '.' (PEP 825)"
        )
    parts = plain.removesuffix(".whl").split("-")
    expected = [str(name).replace("-", "_"), str(version), *parts[2:-3], *(_sorted_tags(part) for part in parts[-3:])]
    canonical = "-".join([*expected, *([label] if label else [])]) + ".whl"
    if not published:
        _check_canonical(filename, canonical)
        _check_tags(filename, parts[-3:])
    return Distribution(
        filename=filename,
        kind="bdist_wheel",
        project=str(name),
        version=str(version),
        tags=tags,
        variant=label,
        canonical=canonical,
        published=published,
    )


def wheel_tags(filename: str) -> frozenset[Tag]:
    """The tags of a wheel, with or without a variant label. The file is known to be a wheel."""
    return parse_wheel_filename(variants.split_label(filename)[0])[3]


def _sdist(filename: str, published: bool) -> Distribution:
    try:
        name, version = parse_sdist_filename(filename)
    except (InvalidSdistFilename, InvalidVersion) as error:
        raise RefusedError(
            f"{filename} is not an sdist's name: {error}", remedy="name the file NAME-VERSION.tar.gz (PEP 625)"
        ) from None
    canonical = f"{str(name).replace('-', '_')}-{version}.tar.gz"
    if not published:
        _check_canonical(filename, canonical)
    return Distribution(
        filename=filename, kind="sdist", project=str(name), version=str(version), canonical=canonical, published=published
    )


def _check_canonical(filename: str, canonical: str) -> None:
    if filename != canonical:
        raise RefusedError(
            f"{filename} is not the canonical spelling of this file name",
            remedy=f"rename the file to {canonical}, since all files of a release use one spelling",
        )


def _sorted_tags(part: str) -> str:
    """Compressed tag sets may have any order (PEP 425 requires sorting, tools do not sort), but lower case and no repeats."""
    return ".".join(dict.fromkeys(part.lower().split(".")))


def _check_tags(filename: str, parts: list[str]) -> None:
    kinds = (("Python", _PYTHON_TAG), ("ABI", _ABI_TAG), ("platform", _PLATFORM_TAG))
    for part, (kind, known) in zip(parts, kinds, strict=True):
        for tag in part.split("."):
            if not known.match(tag):
                raise RefusedError(
                    f"{filename}: {tag!r} is not a known {kind} tag",
                    remedy="build the wheel with tags of PEP 425 and PEP 600, since no installer would select this file",
                )


def check_set_name(name: str) -> str:
    """Return `name` if it is a valid name for a set.

    Raises:
        RefusedError: it is not a path segment, or it would hide another address of the index.
    """
    if not _SET_NAME.match(name):
        raise RefusedError(
            f"{name!r} is not a valid name for a set",
            remedy="use at most 64 characters of a-z, 0-9, '.', '_' and '-'; begin and end with a letter or digit",
        )
    if name in _RESERVED:
        raise RefusedError(
            f"a set cannot be named {name!r}: the index reserves this name for its own address /{name}/",
            remedy=f"choose a different name, for example {name}-1",
        )
    if _CUDA_VIEW.match(name):
        raise RefusedError(
            f"a set cannot be named {name!r}: /{name}/ is the address of the wheels for that CUDA version",
            remedy=f"choose a different name, for example {name}-stack",
        )
    return name


def stack_of_view(name: str) -> tuple[str, str] | None:
    """CUDA and torch of a view: cu130-torch2.11 → 13.0, 2.11; cu92 → 9.2, ""; None if the name has another form."""
    match = _CUDA_VIEW.match(name)
    return (f"{match[1] or match[3]}.{match[2] or match[4]}", match[5] or "") if match else None


def view_of_cuda(cuda: str, torch: str = "") -> str:
    """13.0, 2.11 → cu130-torch2.11; 13.0 → cu130."""
    return "cu" + cuda.replace(".", "") + (f"-torch{torch}" if torch else "")
