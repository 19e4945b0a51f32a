"""entry_points.txt of a wheel, parsed as installers do: uv uses the rules of INI files, pip uses `importlib.metadata`."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from importlib.metadata import EntryPoint
from pathlib import Path

from index.intake.defects import Defects

_SCRIPTS = ("console_scripts", "gui_scripts")
"Groups whose entries installers turn into programs."

_PROGRAM = re.compile(r"(?!\.{1,2}\Z)[^\s/\\\0]+( [^\s/\\\0]+)*\Z")
"The name of a program is a file name. Entry points of other groups may have any name."

_FILE = re.compile(r"(?!\.{0,2}\Z)[^/\0]+\Z")
"A name for which Linux can create a file in the folder of programs."


_REMEDY = "write each entry as `name = package.module:object`, and build again"


def check(raw: bytes, defects: Defects) -> None:
    """Check that installers can read the entries. They read them after the choice of a release, so a failure is final.

    Raises:
        RefusedError: pip or uv would fail on them. A new upload is also refused for entries that no program can use.
    """
    points = _parsed(raw, defects)
    for wrong_with, reject in ((_fatal_in, defects.refuse), (_useless_in, defects.note)):
        if problems := [problem for point in points if (problem := wrong_with(point))]:
            reject("entry_points.txt: " + "; ".join(problems[:3]), remedy=_REMEDY)


class _IniParser(configparser.ConfigParser):
    """Names are case-sensitive."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


class _EntryPoints(importlib.metadata.Distribution):
    """A distribution that contains only this text, for `importlib.metadata`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "entry_points.txt" else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


def _parsed(raw: bytes, defects: Defects) -> list[EntryPoint]:
    parser = _IniParser(delimiters=("=",), interpolation=None, default_section="")
    try:
        text = raw.decode()
        parser.read_string(text)
        return list(_EntryPoints(text).entry_points)
    except UnicodeDecodeError:
        defects.refuse("entry_points.txt: it is not UTF-8", remedy=_REMEDY)
    except configparser.Error as error:
        defects.refuse(f"entry_points.txt: {' '.join(str(error).split())[:200]}", remedy=_REMEDY)
    except (AttributeError, TypeError, ValueError):  # the two parsers disagree on a line without "="
        defects.refuse("entry_points.txt: a line is neither [group] nor name = value", remedy=_REMEDY)


def _fatal_in(point: EntryPoint) -> str:
    """Why installers cannot create this program; empty if they can."""
    if point.group not in _SCRIPTS:
        return ""
    reference = EntryPoint.pattern.match(point.value)
    if reference is None or not reference["attr"]:
        return f"{point.name[:100]} = {point.value[:100]} does not name an object"
    return "" if _FILE.match(point.name) else f"{point.name[:100]!r} is not a valid name for a program"


def _useless_in(point: EntryPoint) -> str:
    """Why an entry that installers accept cannot be used; empty if it can."""
    if point.group in _SCRIPTS:
        return "" if _PROGRAM.match(point.name) else f"{point.name[:100]!r} is not a valid name for a program"
    if EntryPoint.pattern.match(point.value) is None:
        return f"{point.name[:100]} = {point.value[:100]} does not name an object"
    return ""
