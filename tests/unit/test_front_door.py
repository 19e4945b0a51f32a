"""The command lines of all three programs have one style: help, --json, --version, renamed commands, shell completion."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from builder.cli import lock
from builder.planning.settings import load
from gracefarm.errors import UsageError

PROGRAMS = ("builder", "index", "deploy")
WIDTH = 80


def top(program: str) -> click.Group:
    group: click.Group = importlib.import_module(f"{program}.cli").cli
    return group


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and all below it, with the words that name it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from walk(subcommand, (*path, name))


COMMANDS = [entry for program in PROGRAMS for entry in walk(top(program), (program,))]
VERBS = [path for path, command in COMMANDS if not isinstance(command, click.Group)]


def named(path: object) -> str:
    return " ".join(path) if isinstance(path, tuple) else ""


def shown(path: tuple[str, ...], option: str) -> str:
    outcome = CliRunner().invoke(top(path[0]), [*path[1:], option], prog_name=path[0], terminal_width=WIDTH)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=named)
def test_each_help_is_whole_at_80_columns_and_has_an_example(path: tuple[str, ...], command: click.Command) -> None:
    text = shown(path, "-h")
    assert text == shown(path, "--help")
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    assert not re.search(r"\.\.\.$", text.partition("\n")[2], re.MULTILINE), "a text was cut"
    example = " ".join(path) if path[1:] or path[0] == "builder" else path[0]
    assert re.search(rf"^  {re.escape(example)}(\s|$)", text.partition("\n")[2], re.MULTILINE), f"no example of {example}"
    undescribed = [
        parameter.name for parameter in command.params if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert undescribed == []


@pytest.mark.parametrize("path", VERBS, ids=named)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_json_may_stand_before_and_after_each_verb(
    path: tuple[str, ...], after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong command line gives a JSON line. `deploy run` and `deploy ssh` pass unknown options on and fail later."""
    program, *words = path
    words = [*words, "--json"] if after else ["--json", *words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *words, "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{program}.cli").main()
    assert ended.value.code in (2, 3)
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "error"
    assert "--no-such-option" in event["text"] or path in {("deploy", "run"), ("deploy", "ssh")}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_the_result_is_the_same_json_before_and_after_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an own GRACEFARM_HOME, because builds that run at the same time change the list."""
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path))
    before, after = run("builder", "--json", "list"), run("builder", "list", "--json")
    assert before.returncode == 0, before.stderr
    assert json.loads(before.stdout) == json.loads(after.stdout)
    assert before.stdout == after.stdout != run("builder", "list").stdout


def test_json_of_another_program_is_not_ours(tmp_path: Path) -> None:
    """Arguments after -- belong to the command on the nodes."""
    outcome = run("deploy", "--file", str(tmp_path / "deploy.toml"), "run", "--", "lsblk", "--json")
    assert outcome.stdout == ""
    assert "error:" in outcome.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_prints_its_version(program: str) -> None:
    assert re.fullmatch(rf"{program}, version \d\S+\n", shown((program,), "--version"))


@pytest.mark.parametrize(
    ("words", "new"),
    [(("builder", "lock-stack", "cu130"), "`builder lock STACK`"), (("builder", "set", "lock", "mine"), "`builder lock SET`")],
)
def test_an_old_spelling_ends_with_a_line_that_names_the_new_one(words: tuple[str, ...], new: str) -> None:
    outcome = run(*words)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr == f"error: `{' '.join(words[:-1])}` is now {new}\n"


def test_a_name_in_several_folders_is_locked_by_folder_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "NAMES", {"recipes": lambda _: ["both", "one"], "sets": lambda _: ["both"]})
    settings = load()
    assert lock.find("one", settings) == ("recipes", "one")
    assert lock.find("unknown", settings) == ("recipes", "unknown")
    assert lock.find("sets/both", settings) == ("sets", "both")
    with pytest.raises(UsageError, match="both is in recipes/ and in sets/") as caught:
        lock.find("both", settings)
    assert caught.value.remedy == "run `builder lock recipes/both` or `builder lock sets/both`"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("causal_conv1d", "--python", "3.13"), "--python requires a stack, but causal_conv1d is in recipes/"),
        (("gh200-cu130", "--digests"), "--digests requires a stack, but gh200-cu130 is in sets/"),
        (("cu130", "--stack", "cu124"), "--stack requires a recipe, but cu130 is in stacks/"),
        (("cu130", "--toolchain", "container"), "--toolchain requires a recipe, or a stack with --digests"),
    ],
)
def test_an_option_of_lock_that_does_not_apply_is_refused(words: tuple[str, ...], cause: str) -> None:
    outcome = CliRunner().invoke(top("builder"), ["lock", *words])
    assert isinstance(outcome.exception, UsageError)
    assert outcome.exception.cause == cause


def completed(shell: str, program: str, words: list[str], incomplete: str) -> list[str]:
    kind = get_completion_class(shell)
    assert kind is not None
    return [item.value for item in kind(top(program), {}, program, "_X_COMPLETE").get_completions(words, incomplete)]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(program: str, shell: str) -> None:
    assert completed(shell, program, [], "sche") == ["schema"]
    assert completed(shell, program, ["schema"], "--wr") == ["--write"]
    assert set(completed(shell, program, [], "")) == set(top(program).list_commands(click.Context(top(program))))


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_prints_the_script_that_a_shell_loads(program: str) -> None:
    """docs/howto/completion.md has the lines for all shells."""
    variable = f"_{program.upper()}_COMPLETE"
    script = run(program, **{variable: "bash_source"})
    assert (script.returncode, variable in script.stdout) == (0, True)
    words = {"COMP_WORDS": f"{program} sche", "COMP_CWORD": "1"}
    assert run(program, **{variable: "bash_complete"}, **words).stdout == "plain,schema\n"
