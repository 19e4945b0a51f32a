"""`builder run`: build and publish a wheel on one machine, install it with pip from the index, and import it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder import smoke
from builder.box import sandbox
from builder.box.sandbox import BindMount, Sandbox
from builder.compiling import pep517
from builder.flow.attempt import BuildOptions
from builder.flow.build import build
from builder.flow.publishing import refuse_objects, send_record, upload_wheel
from builder.flow.root_stage import lay_ground
from builder.ground import environment
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Record
from builder.toolchains import sandbox_trial
from gracefarm.console import Console
from gracefarm.errors import HostError, InstallError, PublishError
from gracefarm.files import lock, remove_tree
from gracefarm.process import die_with_us, last_line


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The result of a run."""

    wheel: str
    record: str
    log: str
    build_id: str


@contextmanager
def local_index(settings: Settings, *options: str) -> Iterator[tuple[str, str]]:
    """Run `index serve` on a free loopback port, with its store in home/index; yields its URL and an upload token.

    Raises:
        HostError: it did not start; has its last output.
        PublishError: raised in the `with` block; the remedy is changed to one for this index.
    """
    folder = settings.home / "index"
    # A server left by a killed run would lock the store for the next run.
    serve = [sys.executable, "-m", "index", "serve", "--root", str(folder), "--port", "0", "--allow-new", "--json", *options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        (settings.home / "index.log").open("w") as errors,
        subprocess.Popen(die_with_us(serve), stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = next((address for line in server.stdout if (address := _url(line))), None)
            if url is None:
                words = last_line((settings.home / "index.log").read_text())
                raise HostError(
                    f"the local index (`index serve`) did not start: {words}",
                    remedy=f"fix the error, then repeat the command; the complete output is in {settings.home / 'index.log'}",
                    repeat=" ".join(serve),
                )
            yield url, _token(folder)
        except PublishError as error:
            remedy = f"if this index has a different build of the same file, remove the old index: mv {folder} {folder}.old"
            raise PublishError(error.cause, remedy=remedy, repeat=error.repeat) from error
        finally:
            server.terminate()


def _url(line: str) -> str | None:
    try:
        url = json.loads(line).get("url")
    except ValueError:
        return None
    return str(url).rstrip("/") if url else None


def _token(folder: Path) -> str:
    create = [sys.executable, "-m", "index", "token", "create", "--root", str(folder), "--name", "builder-run"]
    process = subprocess.run([*create, "--expires", "1d", "--json"], capture_output=True, text=True, check=True)
    return str(json.loads(last_line(process.stdout))["token"])


def run(plan: Plan, settings: Settings, console: Console) -> Installed:
    """Build, publish, install from the index, import.

    Raises:
        GracefarmError: a step failed.
    """
    refuse_objects(plan.stack.data)
    built = build(plan, BuildOptions(), settings, console)
    folder = record.folder(settings, built.build_id)
    with lock(settings.home / "locks" / "run"), local_index(settings) as (url, token):
        console.step("index", f"serving {url}/simple/ from {settings.home / 'index'}")
        wheel = record.wheel_path(settings, built)
        assert wheel is not None
        # Not written to the record, since the URL is valid only during this run.
        login = ("__token__", token)
        publication = upload_wheel(built, wheel, f"{url}/legacy/", settings, login)
        console.step("publish", f"{publication.filename or wheel.name} to {url}/legacy/")
        send_record(built.build_id, f"{url}/legacy/", settings, console, login)
        _install_back(plan, built, f"{url}/simple/", settings, console, folder)
    return Installed(
        wheel=str(wheel),
        record=str(record.path(settings, built.build_id)),
        log=str(folder / "log.txt"),
        build_id=built.build_id,
    )


def _install_back(plan: Plan, built: Record, index_url: str, settings: Settings, console: Console, folder: Path) -> None:
    """Install the wheel with the pip of a clean environment, only from `index_url`; import it and run smoke.py.

    Raises:
        InstallError: pip, an import or the script failed (has its message), or pip installs another build.
    """
    ground = lay_ground(plan, settings, console)
    clean, files, log = folder / "install" / "env", folder / "install" / "files", folder / "install.txt"
    remove_tree(clean)
    environment.fresh(ground.environment, clean)
    data, script = plan.recipe.data, plan.recipe.smoke_script
    smoke.prepare(files, data.imports, script)
    box = Sandbox(
        root=ground.root,
        mounts=(BindMount(source=clean, target="/env", writable=True), BindMount(source=files, target=sandbox_trial.WORKDIR)),
        environment=sandbox_trial.variables(ground),
        workdir=sandbox_trial.WORKDIR,
        memory=pep517.bound(settings),
        network=True,
    )
    options = ("--no-cache-dir", "--disable-pip-version-check", "--no-input", "--no-compile", "--root-user-action=ignore")
    pip = ("/env/bin/python3", "-m", "pip", "install", *options, "--index-url", index_url, f"{data.name}=={built.version}")
    for what, command in (("cannot be installed into", pip), ("does not work in", smoke.driver(data.imports, script))):
        outcome = sandbox.run(box, command, log=log)
        if outcome.returncode != 0:
            raise InstallError(
                f"{pip[-1]} from {index_url} {what} a clean environment: {pep517.first_error(log)}",
                remedy=f"see the complete output in {log}",
                repeat=f"builder run {plan.recipe.key} --stack {plan.stack.data.name} --target {plan.target.value}",
            )
    assert built.wheel is not None
    stem = "-".join(built.wheel.filename.split("-")[:2])
    installed = [json.loads(place.read_text()) for place in clean.glob(f"lib/*/site-packages/{stem}.dist-info/gracefarm.json")]
    if built.build_id not in [inside["build_id"] for inside in installed]:
        raise InstallError(
            f"pip installs a different build of {pip[-1]} from {index_url}, because that build has a higher build tag",
            remedy=f"remove the old index, then repeat the command: mv {settings.home / 'index'} "
            f"{settings.home / 'index'}.old",
        )
    proven = "the imports work" + (", smoke.py passes" if script else "")
    console.step("install", f"pip installed {data.name} from {index_url}; {proven} (in {outcome.wall_s:.0f} s)")
    shutil.rmtree(folder / "install")
