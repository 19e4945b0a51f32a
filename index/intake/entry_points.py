"""entry_points.txt of a wheel, parsed as installers do: uv uses the rules of INI files, pip uses `importlib.metadata`."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from importlib.metadata import Distribution as InstalledDistribution
from importlib.metadata import EntryPoint
from pathlib import Path

from index.intake.defects import Defects

_SCRIPTS = ("console_scripts", "gui_scripts")
"Groups whose entries installers turn into programs."

_PROGRAM = re.compile(r"(?!\.{1,2}\Z)[^\s/\\\0]+( [^\s/\\\0]+)*\Z")
"The name of a program is a file name. Entry points of other groups may have any name."


def check(raw: bytes, defects: Defects) -> None:
    """Note the entries that installers cannot read.

    Raises:
        RefusedError: there are such entries, and the file is a new upload.
    """
    if problems := list(_problems(raw)):
        defects.note(
            "entry_points.txt: " + "; ".join(problems[:3]),
            remedy="write each entry as `name = package.module:object`, and build again",
        )


class _IniParser(configparser.ConfigParser):
    """Names are case-sensitive."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


class _EntryPoints(InstalledDistribution):
    """A distribution that contains only this text, for `importlib.metadata`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "entry_points.txt" else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


def _problems(raw: bytes) -> Iterator[str]:
    parser = _IniParser(delimiters=("=",), interpolation=None, default_section="")
    try:
        text = raw.decode()
        parser.read_string(text)
        found = list(_EntryPoints(text).entry_points)
    except UnicodeDecodeError:
        yield "it is not UTF-8"
    except configparser.Error as error:
        yield " ".join(str(error).split())[:200]
    except (AttributeError, TypeError, ValueError):  # the two parsers disagree on a line without "="
        yield "a line is neither [group] nor name = value"
    else:
        for point in found:
            yield from _wrong_with(point)


def _wrong_with(point: EntryPoint) -> Iterator[str]:
    reference = EntryPoint.pattern.match(point.value)
    is_program = point.group in _SCRIPTS
    if reference is None or (is_program and not reference["attr"]):
        yield f"{point.name[:100]} = {point.value[:100]} does not name an object"
    elif is_program and not _PROGRAM.match(point.name):
        yield f"{point.name[:100]!r} is not a valid name for a program"
