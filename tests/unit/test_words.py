"""Plain English: words and constructions of the project's former dialect do not return to what has been rewritten."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DIALECT = {
    "mend": r"mend(?:s|ed|ing)?",
    "anew": r"anew",
    "whoever": r"who(?:m|so)?ever",
    "nobody, somebody": r"(?:no|some|any|every)body(?:'s)?(?!:)",  # nobody: is a user of /etc/passwd
    "X is no Y": r"(?<!there )(?:is|are|was|were|be) no (?!longer|more|matter)[a-z]+",
    "of its own": r"of (?:its|his|her|their|our|your|one's|somebody's|a person's) own",
    "stands in": r"stands? in",
    "cannot be had": r"(?:be|been) had",
    "has none": r"(?:has|have|had) none",
    "such a one": r"such a one",
    "but for": r"but for",
    "lest": r"lest|nought|naught",
    "X alone": r"(?<!let it )(?<!leave it )alone",
    "is to be": r"(?:is|are|was|were) to be",
    "takes away": r"(?:take|takes|took|taken|taking|leave|leaves|left) away",
    "for ever": r"for ever",
    "as it were": r"as it were|so to speak",
}
"What a reviewer calls it, and how to find it."

TO_DO = frozenset(
    {
        "builder/data/root/bytecode.py",  # in every root's digest: rewritten with the next functional change
        "tests/integration/sandbox/kit.py",  # the user `nobody`
        "tests/integration/test_recipe_patches.py",  # asserts a sentence of a patch, which enters a build id
        "tests/integration/test_root.py",  # the key `alone` of a stack's root, and the user `nobody`
    }
)
"Files and folders that are not rewritten yet. A name leaves this list when its last hit is gone, and does not come back."

NOT_OURS = (
    "LICENSE",
    "tests/samples/",  # what an old commit wrote
    "builder/data/sandbox/passwd",  # names of users
    "tests/unit/test_words.py",
)
SUFFIXES = {
    "",
    ".py",
    ".md",
    ".toml",
    ".html",
    ".js",
    ".css",
    ".sql",
    ".sh",
    ".yml",
    ".yaml",
    ".conf",
    ".json",
    ".txt",
    ".cfg",
}
QUOTATION = re.compile(r"“[^”]*”")
PATTERN = re.compile("|".join(f"(?P<g{number}>{word})" for number, word in enumerate(DIALECT.values())))
WORD = re.compile(rf"(?<![\w/.-])(?:{PATTERN.pattern})(?![\w-])", re.IGNORECASE)


def hits(text: str) -> list[str]:
    """The dialect of a text, without its quotations (in “ ”)."""
    return [match[0] for match in WORD.finditer(QUOTATION.sub("", " ".join(text.split())))]


@cache
def texts() -> dict[str, str]:
    """Path to content of each text file that is part of the project."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    paths = [REPOSITORY / name for name in names if name and not name.startswith(NOT_OURS)]
    return {
        path.relative_to(REPOSITORY).as_posix(): prose(path)
        for path in paths
        if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink()
    }


def prose(path: Path) -> str:
    """What a person reads in a file: no code of Markdown, no keys of TOML and JSON, comments and strings of Python."""
    text = path.read_text()
    if path.suffix == ".md":
        return re.sub(r"`[^`\n]*`", "", text)
    if path.suffix == ".json":
        return re.sub(r'"title": "[^"]*"|"[\w-]+":', "", text)
    if path.suffix == ".toml":
        return re.sub(r"^[\w.-]+ *=", "", text, flags=re.MULTILINE)
    if path.suffix != ".py":
        return text
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


def place(path: str) -> str:
    """The entry of TO_DO that covers the path; empty if there is none."""
    return next((entry for entry in TO_DO if path == entry or (entry.endswith("/") and path.startswith(entry))), "")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("mend the file, or write it anew", 2),
        ("Nobody's file; a folder of\n    its own, but for the log", 3),
        ("X is no Python", 1),
        ("there is no such file, and it is no longer read", 0),
        ("amend, recommend, standalone", 0),
        ("the row “mend it anew” of the table", 0),
        ("this is for ours alone; leave it alone", 1),
    ],
)
def test_the_dialect_is_found_and_english_is_not(text: str, count: int) -> None:
    assert len(hits(text)) == count


def test_what_has_been_rewritten_stays_plain_english() -> None:
    found = {path: hits(text) for path, text in texts().items() if not place(path)}
    assert {path: words for path, words in found.items() if words} == {}


def test_what_is_still_to_do_has_dialect() -> None:
    counts: Counter[str] = Counter()
    for path, text in texts().items():
        counts[place(path)] += len(hits(text))
    assert sorted(entry for entry in TO_DO if not counts[entry]) == [], "done: remove it from TO_DO"
