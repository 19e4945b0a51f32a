"""`--twin`: an x86_64 wheel whose device code is compiled as for aarch64. It has another build id, and is not published."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from builder.cli import cli
from builder.cli.options import as_built, plan_of
from builder.farm import job
from builder.farm.job import Share
from builder.flow.attempt import Attempt, BuildOptions
from builder.planning.plan import TWIN, Plan
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch, host_arch
from builder.proof import why
from builder.proof.record import Record
from builder.toolchains import wrappers
from builder.toolchains.choice import ToolchainChoice
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, UsageError
from tests.conftest import REPOSITORY

HOSTS = dict.fromkeys(Arch, Arch.X86_64)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("GRACEFARM_PROJECT", str(REPOSITORY))
    monkeypatch.setenv("GRACEFARM_HOME", str(tmp_path))
    return load()


def planned(settings: Settings, name: str = "torch_scatter", target: Arch = Arch.X86_64, *, twin: bool = True) -> Plan:
    return plan_of(name, None, target.value, settings, ToolchainChoice(hosts=HOSTS, twin=twin))


def record_of(plan: Plan, settings: Settings, folder: Path) -> Record:
    attempt = Attempt(plan=plan, options=BuildOptions(), settings=settings, console=Console(), folder=folder)
    return Record.model_validate_json(attempt.record(None, None).model_dump_json()).model_copy(update={"outcome": "built"})


def test_a_twin_is_compiled_with_its_options_after_those_of_the_recipe(settings: Settings) -> None:
    def flags(plan: Plan) -> str | None:
        return wrappers.variables(plan, jobs=1, epoch=0).get("NVCC_APPEND_FLAGS")

    own = "-UTORCH_API_INCLUDE_EXTENSION_H"
    assert TWIN == "-Xcudafe --unsigned_chars -Xcompiler -funsigned-char"
    assert flags(planned(settings)) == f"{own} {TWIN}"
    assert flags(planned(settings, twin=False)) == own
    assert flags(planned(settings, "causal_conv1d")) == TWIN
    assert flags(planned(settings, "causal_conv1d", twin=False)) is None


def test_a_twin_is_another_build_which_its_record_tells(settings: Settings, tmp_path: Path) -> None:
    twin, plain = planned(settings), planned(settings, twin=False)
    assert twin.build_id != plain.build_id
    assert [change.path for change in why.changes(plain.inputs, twin.inputs)] == ["twin"]
    assert twin.repeat == f"{plain.repeat} --twin"
    assert twin.title == f"{plain.title}, twin of the aarch64 wheel"
    records = [record_of(plan, settings, tmp_path) for plan in (twin, plain)]
    assert [build.asked_twin for build in records] == [True, False]
    assert len(why.cells(records)) == 2, "`builder why --all` shows both"
    assert [as_built(build, None, None, None).twin for build in records] == [True, False]


def test_another_machine_builds_the_twin_too(settings: Settings) -> None:
    share = Share(cpus=1, memory=1)
    jobs = [
        job.of_plan(plan, BuildOptions(), share, code="", gracefarm="")
        for plan in (planned(settings), planned(settings, twin=False))
    ]
    assert [each.twin for each in jobs] == [True, False]


@pytest.mark.parametrize(
    ("name", "target", "cause"),
    [
        (
            "torch_scatter",
            Arch.AARCH64,
            "--twin builds the x86_64 twin of an aarch64 wheel, but the target of this build is aarch64",
        ),
        ("triton", Arch.X86_64, "--twin requires device code, but recipe triton has no CUDA"),
    ],
)
def test_what_has_no_twin_is_refused(settings: Settings, name: str, target: Arch, cause: str) -> None:
    with pytest.raises(UsageError) as refused:
        planned(settings, name, target)
    assert (refused.value.cause, int(refused.value.exit_code)) == (cause, 2)


def test_a_twin_is_not_published(settings: Settings) -> None:
    aim = ["build", "causal_conv1d", "--target", "x86_64", "--publish", "http://127.0.0.1:9/legacy/"]
    error = CliRunner().invoke(cli, [*aim, "--twin"], standalone_mode=False).exception
    assert isinstance(error, UsageError)
    assert "--twin and --publish cannot be used together" in error.cause
    assert not list(settings.home.glob("builds/*")), "nothing was built"


@pytest.mark.skipif(host_arch() is Arch.AARCH64, reason="only an x86_64 host builds for x86_64")
def test_the_command_line_plans_a_twin(settings: Settings) -> None:
    ran = CliRunner().invoke(cli, ["plan", "causal_conv1d", "--target", "x86_64", "--twin"], standalone_mode=False)
    assert not isinstance(ran.exception, GracefarmError), ran.exception
    assert f'"twin": "{TWIN}"' in ran.stdout
