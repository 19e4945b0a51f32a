"""Every command that the workflows, the pages and the programs' own help name is one that the programs have."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r" {4}\s*(?:(?:\.venv/bin/)?python -m )?(builder|index|deploy) (?=[a-z])")
OURS = re.compile(r"(?:^|\s)(?:(?:\.venv/bin/)?python -m )?(builder|index|deploy) (.*)")
EXAMPLE = re.compile(r"\s*(builder|index|deploy) (?=[a-z])")
LINK = re.compile(r"\]\(([^)\s:]+)\)")


def steps(path: Path) -> list[str]:
    """Lines of the `run` of each step of a workflow."""
    jobs = yaml.safe_load(path.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return [line for run in runs for line in re.sub(r"\$\{\{.*?\}\}", "triton", run).splitlines()]


def blocks(path: Path) -> list[str]:
    """Lines of a page's code blocks that call a program of ours."""
    return [line.strip() for line in path.read_text().splitlines() if BLOCK.match(line)]


def commands(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Program and arguments of each call of ours."""
    for line in lines:
        if match := OURS.search(line):
            words = shlex.split(match[2], comments=True)
            end = next((i for i, word in enumerate(words) if word in ("&", "|", ";", "&&", ">")), len(words))
            yield match[1], words[:end]


def check(program: str, words: list[str]) -> None:
    """The subcommand answers --help, has each option, and takes as many arguments."""
    command: click.Command = importlib.import_module(f"{program}.cli").cli
    path = []
    while isinstance(command, click.Group) and words[len(path)] != "--help":
        context = click.Context(command, info_name=program)
        name = words[len(path)]
        found = command.get_command(context, name)
        assert found is not None, f"{program} {' '.join(path)} has no command {name!r}"
        path.append(name)
        command = found
    assert CliRunner().invoke(importlib.import_module(f"{program}.cli").cli, [*path, "--help"]).exit_code == 0
    # click's own parser: an option that is not there, or an argument too many, is a UsageError.
    command.make_parser(click.Context(command)).parse_args(args=list(words[len(path) :]))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_step_of_a_workflow_is_a_command_that_exists(path: Path) -> None:
    lines = steps(path)
    assert lines
    for program, words in commands(lines):
        check(program, words)
    for line in lines:
        first = shlex.split(line)[0] if line.strip() else ""
        if first == "make":
            subprocess.run(["make", "--dry-run", *shlex.split(line)[1:]], cwd=REPOSITORY, check=True, capture_output=True)
        elif first.startswith("."):
            assert (REPOSITORY / first).exists() or first.startswith(".venv/"), first


def test_the_pinned_workflow_plans_builds_and_publishes_the_three() -> None:
    path = REPOSITORY / ".github" / "workflows" / "pinned.yml"
    said = [" ".join([program, *words[:1]]) for program, words in commands(steps(path))]
    assert [line for line in said if line.startswith("builder ")][:2] == ["builder plan", "builder build"]
    matrix = yaml.safe_load(path.read_text())["jobs"]["build"]["strategy"]["matrix"]
    assert matrix["recipe"] == ["triton", "flash_attn", "aphrodite"]
    # Singly, a wheel would be seen before the set that it is part of.
    assert not any("--publish" in words for _, words in commands(steps(path)))
    assert any("--stage" in words for _, words in commands(steps(path)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_command_of_a_page_exists(path: Path) -> None:
    for program, words in commands(blocks(path)):
        check(program, words)


def helps(command: click.Command) -> Iterator[str]:
    """The help of a command and of all below it."""
    yield command.help or ""
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            yield from helps(subcommand)


def test_each_example_of_a_help_exists() -> None:
    texts = [text for name in ("builder", "index", "deploy") for text in helps(importlib.import_module(f"{name}.cli").cli)]
    examples = [line for text in texts for line in text.splitlines() if EXAMPLE.match(line)]
    assert examples
    for name, words in commands(examples):
        check(name, words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_link_of_a_page_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        name, _, heading = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], (
            target
        )


def test_a_command_that_is_not_there_is_found() -> None:
    for program, words in (("builder", ["bild", "triton"]), ("builder", ["build", "triton", "--no-such-option"])):
        with pytest.raises((AssertionError, click.UsageError)):
            check(program, words)


def test_each_test_that_a_page_names_exists() -> None:
    text = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    pages = sorted((REPOSITORY / "docs").rglob("*.md"))
    named = [(path.name, name) for path in pages for name in re.findall(r"`(test_\w+)`", path.read_text())]
    assert ("pinned.md", "test_trap_3_the_cpu_torch_of_the_same_version_is_refused") in named
    assert [(page, test) for page, test in named if f"def {test}(" not in text] == []


def named_files(text: str) -> set[str]:
    """Paths of our code in a text, and the files of the modules that it runs or writes in backquotes."""
    paths = set(re.findall(r"(?<![\w./-])(?:builder|index|deploy|gracefarm|tests|bench|tools)/[\w/-]+\.(?:py|sh)\b", text))
    modules = re.findall(r"(?:-m |`)((?:builder|index|deploy|gracefarm)(?:\.[a-z_]+)+)(?=[` \n])", text)
    return paths | {name.replace(".", "/") for name in modules if not name.endswith((".toml", ".md", ".lock", ".json"))}


def test_each_file_of_ours_that_a_page_or_a_comment_names_exists() -> None:
    """By path (deploy/data/jobs.sh) or by module (`builder.box.sandbox`)."""
    assert named_files("see deploy/data/jobs.sh, `deploy.remote`") == {"deploy/data/jobs.sh", "deploy/remote"}
    code = [path for top in ("builder", "index", "deploy", "gracefarm") for path in (REPOSITORY / top).rglob("*.py")]
    notes = [
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "recipes").glob("*/NOTES.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
    ]
    lost = [
        f"{path.relative_to(REPOSITORY)} names {name}"
        for path in (REPOSITORY / "README.md", *notes, *code)
        if path.exists()
        for name in sorted(named_files(path.read_text()))
        if not any((REPOSITORY / place).exists() for place in (name, f"{name}.py", f"{name.rpartition('/')[0]}.py"))
    ]
    assert lost == []
