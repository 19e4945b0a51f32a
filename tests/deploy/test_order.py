"""The order of the steps: nothing twice, again where a look denies it, and what a failure leaves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deploy.fleet.calls import RemoteNode
from deploy.fleet.ssh import open_fleet
from deploy.nodes import state
from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment, Node
from deploy.nodes.facts import Facts
from deploy.nodes.state import StepRecord
from deploy.planning.commands import option
from deploy.rehearsal import source, standin
from deploy.remote import look, marked
from deploy.steps import environment, order, processes, ray, setlock, step
from deploy.steps.assignment import told
from deploy.steps.download_environment import DownloadStep
from deploy.steps.environment import EnvironmentStep
from deploy.steps.order import StepChoice
from deploy.steps.proof import ProofStep
from deploy.steps.step import Applied, Looks, Step, Work, perform
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import ConfigError, FetchError, GracefarmError, HostError, InstallError, NodeError, UsageError
from tests.conftest import REPOSITORY
from tests.deploy import kit


def with_work(folder: Path, do: Callable[[Work], Awaitable[None]], **data: Any) -> state.State:
    """`do` with a deployment that has no nodes; the state afterwards."""
    deployment = Deployment(path=folder / "deploy.toml", data=Config.model_validate(data), nodes=())
    deployment.folder.make()
    with state.hold(deployment.folder, "test", on_wait=pytest.fail) as keeper:
        fleet: Any = None
        work = Work(
            deployment=deployment,
            fleet=fleet,
            facts=Facts(nodes=()),
            keeper=keeper,
            console=Console(),
            settings=settings.SharedSettings(),
        )
        asyncio.run(do(work))  # type: ignore[arg-type]
    return state.read(deployment.folder)


class Made(Step):
    """A step that writes down what it was done for."""

    def __init__(self, name: str, inputs: str = "a", why: str | None = None, *, error: GracefarmError | None = None) -> None:
        self.name, self.of, self.why, self.error = name, inputs, why, error
        self.seconds, self.skipped, self.changed = 0.0, False, True
        self.applied: list[str] = []

    def inputs(self, _work: Work, _looks: Looks) -> str:
        return self.of

    def check(self, _work: Work, _record: StepRecord, _looks: Looks) -> str | None:
        return self.why

    async def apply(self, _work: Work, _looks: Looks) -> Applied:
        await asyncio.sleep(self.seconds)
        if self.error:
            raise self.error
        self.applied.append(self.of)
        return Applied(text="made", now="just now", data={"of": self.of}, skipped=self.skipped, changed=self.changed)


def test_a_step_is_done_once_and_again_when_its_inputs_change_or_a_look_denies_it(tmp_path: Path) -> None:
    applied: list[str] = []

    async def go(work: Work) -> None:
        async def done(inputs: str, why: str | None = None, work: Work = work) -> bool:
            made = Made("weights", inputs, why)
            was = await perform(made, work, {}) is not None
            assert was == bool(made.applied)
            applied.extend(made.applied)
            return was

        assert await done("a")
        assert not await done("a")
        assert await done("b")
        assert await done("b", "k1 does not see it")
        assert not await done("b")
        assert await done("b", work=replace(work, again=("weights",)))
        assert not await done("b")

    found = with_work(tmp_path, go)
    assert applied == ["a", "b", "b", "b"]
    assert found.steps["weights"].outcome == "done"
    assert found.data("weights") == {"of": "b"}


def test_a_step_that_looks_by_itself_says_whether_there_was_anything_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def go(work: Work) -> None:
        made = Made("ray", why="")
        await perform(made, work, {})
        made.changed = False
        await perform(made, work, {})
        assert made.applied == ["a", "a"]

    with_work(tmp_path, go)
    first, second = capsys.readouterr().err.splitlines()
    assert "nothing to do" not in first
    assert "nothing to do: made" in second


def test_a_step_without_inputs_has_nothing_to_be_done_for(tmp_path: Path) -> None:
    async def go(work: Work) -> None:
        assert await perform(ProofStep(), work, {}) is None  # there is no environment yet

    assert with_work(tmp_path, go).steps == {}


def test_a_failure_is_kept_and_tried_again(tmp_path: Path) -> None:
    async def go(work: Work) -> None:
        with pytest.raises(HostError):
            await perform(Made("cache", error=HostError("no room", remedy="make some")), work, {})
        assert work.keeper.state.steps["cache"].outcome == "failed"
        works = Made("cache")
        works.skipped = True
        assert await perform(works, work, {})
        assert work.keeper.state.steps["cache"].outcome == "skipped"

    with_work(tmp_path, go)


def test_an_environment_that_fails_is_told_while_the_weights_still_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told_then: list[str] = []

    class TakesHours(Made):
        async def apply(self, work: Work, looks: Looks) -> Applied:
            await asyncio.sleep(0.15)
            told_then.append(capsys.readouterr().err)
            return await super().apply(work, looks)

    async def looked(_work: Work) -> Looks:
        return {}

    fails = Made("environment", error=InstallError("the index lacks tiny", remedy="mirror it"))
    monkeypatch.setattr(order, "FIRST", ((Made("preflight"),), (Made("cache"),)))
    monkeypatch.setattr(order, "TOGETHER", ((fails,), (Made("download"), TakesHours("weights"))))
    monkeypatch.setattr(order, "look_at_nodes", looked)

    async def go(work: Work) -> None:
        with pytest.raises(InstallError):
            await order.up(work)

    found = with_work(tmp_path, go)
    assert {name: record.outcome for name, record in found.steps.items()} == {
        **dict.fromkeys(("preflight", "cache", "download", "weights"), "done"),
        "environment": "failed",
    }
    assert len(told_then) == 1  # the weights came to their end
    words = " ".join(told_then[0].split())
    assert "environment failed: the index lacks tiny; mirror it. Still running: weights" in words


def test_a_failure_is_told_with_the_step_that_failed_and_not_with_the_last_one_of_its_lane(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = Made("download", error=InstallError("k0: uv could not install Python", remedy="set a mirror"))
    slow = Made("environment")
    slow.seconds = 0.1

    async def go(work: Work) -> None:
        with pytest.raises(InstallError):
            await step.side_by_side([(slow,), (fails, Made("weights"))], work, {})

    assert set(with_work(tmp_path, go).steps) == {"download", "environment"}
    words = " ".join(capsys.readouterr().err.split())
    assert "download failed: k0: uv could not install Python; set a mirror. Still running: environment" in words


def test_serve_tells_the_notes_of_the_plan_such_as_nodes_that_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan: Any = SimpleNamespace(id="p", notes=("1 node serves, 2 are not used (k1 to k2)",))

    async def planned(_work: Work) -> Any:
        return plan

    async def asked(*_arguments: object) -> dict[str, Any]:
        return {"environments": {}}

    monkeypatch.setattr("deploy.steps.served_plan.plan_of", planned)
    monkeypatch.setattr(order, "ask_briefly", asked)
    monkeypatch.setattr(order, "RAY", Made("ray"))
    monkeypatch.setattr(order, "ENGINE", Made("engine"))

    async def go(work: Work) -> None:
        fleet: Any = SimpleNamespace(mark="m")
        deployment = work.deployment.model_copy(update={"nodes": (Node(name="k0", rank=0, address="127.0.0.1"),)})
        await order.serve(replace(work, deployment=deployment, fleet=fleet))

    with_work(tmp_path, go, share="/srv")
    assert "1 node serves, 2 are not used (k1 to k2)" in " ".join(capsys.readouterr().err.split())


def test_what_was_killed_in_the_middle_is_never_taken_for_done(tmp_path: Path) -> None:
    class NotLookedAt(Made):
        def check(self, _work: Work, _record: StepRecord, _looks: Looks) -> str | None:
            raise AssertionError("a step that did not end is not looked at, it is done")

    async def go(work: Work) -> None:
        work.keeper.begin("weights", "a")
        assert await perform(NotLookedAt("weights"), work, {})

    with_work(tmp_path, go)


def test_steps_that_do_not_exist_are_told() -> None:
    with pytest.raises(UsageError, match="unknown step 'weight'"):
        StepChoice(skip=("weight",)).check()
    with pytest.raises(UsageError, match="unknown step 'ray'"):
        StepChoice(start="ray").check()


def test_without_a_lock_nothing_is_built(tmp_path: Path) -> None:
    deployment = Deployment(path=tmp_path / "deploy.toml", data=Config(), nodes=())
    with pytest.raises(ConfigError, match="no lock of the set gh200-cu124") as error:
        setlock.lock_text(deployment, Console())
    assert "builder set build gh200-cu124" in error.value.remedy
    (tmp_path / "gh200-cu124.lock").write_text("a")
    assert setlock.lock_text(deployment, Console()) == "a"


@pytest.mark.parametrize("data", [{}, {"python": "system"}, {"python": "conda"}, {"python_mirror": "file:///srv/mirror"}])
def test_both_environments_stand_on_the_python_that_deploy_toml_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, str]
) -> None:
    """By default on one that they bring: Ubuntu 22.04 and 24.04 have no Python 3.11."""
    lock = (REPOSITORY / "stacks/cu124/requirements.lock").read_text()
    (tmp_path / "gh200-cu124.lock").write_text(f"{lock}aphrodite-engine==1 --hash=sha256:{'0' * 64}\n")
    asked: list[tuple[str, str, str | None]] = []

    async def build(_nodes: object, spec: environment.EnvironmentSpec, *_more: object) -> environment.Built:
        asked.append((spec.link, spec.source, spec.mirror))
        return environment.Built(id=spec.link * 8, built=True, switched=True, rows={})

    monkeypatch.setattr(environment, "build_and_activate", build)

    async def go(work: Work) -> None:
        await perform(EnvironmentStep(), work, {})
        await perform(DownloadStep(), work, {})

    with_work(tmp_path, go, share="/srv/share", **data)
    source, mirror = data.get("python", "managed"), data.get("python_mirror")
    assert asked == [("env", source, mirror), ("download", source, mirror)]


def test_a_set_without_the_engine_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine = "vllm"` with the other engine's set would be found out by an import, when the environment is built."""
    (tmp_path / "gh200-cu124.lock").write_text((REPOSITORY / "stacks/cu124/requirements.lock").read_text())
    (tmp_path / "gh200-cu130.lock").write_text((REPOSITORY / "sets/gh200-cu130/requirements.lock").read_text())
    monkeypatch.setattr(environment, "build_and_activate", pytest.fail)

    async def refused(work: Work) -> None:
        with pytest.raises(ConfigError, match="gh200-cu124 has no vllm, which the engine vllm requires") as error:
            await perform(EnvironmentStep(), work, {})
        assert '"gh200-cu130" (aarch64 nodes) or "x86_64-cu130" (x86_64 nodes)' in error.value.remedy

    async def taken(work: Work) -> None:
        assert environment.spec_of(work).engine == "vllm"

    with_work(tmp_path, refused, engine="vllm", share="/srv/share")
    with_work(tmp_path, taken, engine="vllm", set="gh200-cu130", share="/srv/share")


def test_the_sets_lock_comes_from_its_index_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    source.index_command(root, "host", "aphrodite-engine")
    source.index_command(root, "stage", "create", "spring", "--without", "ray")  # only the stand-in
    token = source.index_command(root, "token", "create", "--name", "farm")["token"]
    path = tmp_path / "spring.lock"
    with source.listening([sys.executable, "-m", "index", "--root", str(root), "--json", "serve", "--port", "0"]) as url:
        data = Config.model_validate({"set": "spring", "index": url + "/spring/simple/"})
        deployment = Deployment(path=tmp_path / "deploy.toml", data=data, nodes=())
        with pytest.raises(FetchError, match=r"/spring/requirements\.lock answered HTTP 404") as error:  # not published yet
            setlock.lock_text(deployment, Console())
        assert "check that the set is published" in error.value.remedy
        assert not path.exists()
        made = standin.build(tmp_path / "wheels").path
        name, content = made.name, made.read_bytes()
        with httpx.Client(base_url=url, auth=("__token__", token)) as client:
            form = {":action": "file_upload", "sha256_digest": hashlib.sha256(content).hexdigest()}
            client.post("/stage/spring/legacy/", data=form, files={"content": (name, content)}).raise_for_status()
            client.post("/stage/spring/publish").raise_for_status()
        text = setlock.lock_text(deployment, Console())
        digest = hashlib.sha256(content).hexdigest()
        assert text.splitlines()[1:] == [f"aphrodite-engine=={name.split('-')[1]} \\", f"    --hash=sha256:{digest}"]
        assert path.read_text() == text
    assert setlock.lock_text(deployment, Console()) == text  # the index is gone
    path.unlink()
    with pytest.raises(FetchError, match=r"the set spring cannot be fetched from \S+/requirements\.lock: ") as error:
        setlock.lock_text(deployment, Console())
    assert error.value.remedy.startswith("check that the index is running")
    assert str(path) in error.value.remedy
    named = deployment.model_copy(update={"data": data.model_copy(update={"lock": "mine.lock"})})
    with pytest.raises(ConfigError, match=r"mine\.lock"):  # a lock that a person named is not replaced by another
        setlock.lock_text(named, Console())


def test_an_index_that_asks_who_it_is_is_told_by_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:s3cret").decode()
            self.send_response(200 if good else 401)
            self.end_headers()
            self.wfile.write(b"x==1 \\\n    --hash=sha256:" + b"0" * 64)

        def log_message(self, *_words: object) -> None:
            pass

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asks) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        data = Config(set="spring", index=f"http://127.0.0.1:{server.server_port}/spring/simple/")
        deployment = Deployment(path=tmp_path / "deploy.toml", data=data, nodes=())
        try:
            with pytest.raises(FetchError, match="answered HTTP 401") as refused:
                setlock.lock_text(deployment, Console())
            assert "~/.netrc" in refused.value.remedy
            (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
            (tmp_path / ".netrc").chmod(0o644)
            with pytest.raises(ConfigError, match="too permissive"):
                setlock.lock_text(deployment, Console())
            (tmp_path / ".netrc").chmod(0o600)
            assert setlock.lock_text(deployment, Console()).startswith("x==1")
        finally:
            server.shutdown()
            thread.join()


def test_a_node_that_hangs_does_not_hold_the_command_for_ever() -> None:
    class Hangs:
        async def stream(self, *_words: object, **_more: object) -> object:
            await asyncio.sleep(600)
            raise AssertionError

    node = RemoteNode(name="k1", address="", gpus=1, shell=Hangs())  # type: ignore[arg-type]
    begun = time.monotonic()
    with pytest.raises(NodeError, match=r"k1: no answer to a short call within 0\.3 s"):
        asyncio.run(step.ask_briefly(node, {}, seconds=0.3))
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(("count", "text"), [(12, "12 bytes"), (3_932_469, "3.9 MB"), (811_706_777_600, "811.7 GB")])
def test_sizes_are_told_as_hubs_tell_them(count: int, text: str) -> None:
    assert told(count) == text


# what runs on a node


def started(mark: str, code: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "GRACEFARM_MARK": mark, "GRACEFARM_PLAN": "p1"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=subprocess.PIPE)


def test_ours_is_told_by_mark_and_session_and_ended_with_all_of_it() -> None:
    """A child that lost its mark, as Ray's agents do, is found by its session; one that ignores TERM gets KILL."""
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    code = f"""
import os, signal, subprocess, sys
env = {{key: value for key, value in os.environ.items() if not key.startswith("GRACEFARM_")}}
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], env=env)
print(child.pid, flush=True)
signal.pause()
"""
    mark = f"t{os.getpid()}"
    other = started(f"{mark}0/k1/ray", "import signal; print(flush=True); signal.pause()")
    with started(f"{mark}/k1/ray", code) as mine:
        try:
            assert mine.stdout
            assert other.stdout
            lines = sorted(mine.stdout.readline().strip() for _ in range(2))
            child = int(lines[0])
            other.stdout.readline()
            found = marked.processes(f"{mark}/k1/")
            assert {process["pid"] for process in found} == {mine.pid, child}
            assert {process["plan"] for process in found} == {"p1"}
            assert {process["mark"] for process in found} == {f"{mark}/k1/ray"}
            assert marked.processes(f"{mark}/k1/engine") == []
            done = marked.stop({"prefixes": [f"{mark}/k1/"], "grace": 1})
            assert done["ended"] == 2
            assert done["left"] == []
            assert other.poll() is None
        finally:
            other.kill()
            other.communicate()
            mine.kill()


def test_a_port_has_its_holder_and_a_free_one_none() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as one:
        port = int(one.getsockname()[1])
        found = look.look({"prefix": "-", "ports": [port]})
        assert f"process {os.getpid()}" in found["holders"][str(port)]
    assert look.look({"prefix": "-", "ports": [port]})["holders"] == {}


def test_the_holder_of_a_port_has_its_deployment_though_it_has_lost_its_mark() -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "here = socket.create_server(('127.0.0.1', 0))\n"
        "if sys.argv[1:]: print(here.getsockname()[1], flush=True), sys.stdin.read()\n"
        "else: subprocess.run([sys.executable, '-c', os.environ['CODE'], 'agent'], env={})"
    )
    env = {**os.environ, "GRACEFARM_MARK": "0123456789ab/k0/ray", "CODE": code}
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdin
        assert leader.stdout
        port = leader.stdout.readline().decode().strip()
        who = look.look({"prefix": "-", "ports": [int(port)]})["holders"][port]
        leader.stdin.close()
    assert who.endswith(" of deployment 0123456789ab)")
    assert "its file .deploy/id contains 0123456789ab" in processes.stop_hint(who, "")
    assert processes.stop_hint("redis-server (process 7)", "stop it") == "stop it"


def test_ports_and_options_are_read_from_the_plans_own_command() -> None:
    argv = ("ray", "start", "--head", "--port", "6379", "--node-manager-port=8077", "--min-worker-port", "20000")
    assert ray.ports(argv) == [6379, 8077]
    assert option(argv, "--node-manager-port") == "8077"
    assert option(argv, "--temp-dir") is None


def test_another_plans_raylet_is_not_this_plans() -> None:
    found = {"processes": [{"name": "raylet", "plan": "p1"}, {"name": "gcs_server", "plan": "p1"}]}
    assert processes.raylet(found, "p1")
    assert not processes.raylet(found, "p2")
    assert not processes.raylet({"processes": [{"name": "gcs_server", "plan": "p1"}]})


def test_two_deployments_of_one_name_on_one_share_do_not_switch_each_others_environment(tmp_path: Path) -> None:
    more = f'share = "{tmp_path}/share"'
    (tmp_path / "share").mkdir()

    async def go() -> None:
        async with kit.machines(tmp_path, 1) as made:
            works = []
            for name in ("first", "second"):
                (tmp_path / name).mkdir()
                shutil.copy(tmp_path / "known_hosts", tmp_path / name)
                works.append(kit.deployment(tmp_path / name, made, more=more))
            async with open_fleet(works[0], config=[]) as fleet, open_fleet(works[1], config=[]) as other:
                first, second = (
                    Work(
                        deployment=deployment,
                        fleet=each,
                        facts=Facts(nodes=()),
                        keeper=state.Keeper(deployment.folder),
                        console=Console(),
                        settings=settings.SharedSettings(),
                    )
                    for deployment, each in zip(works, (fleet, other), strict=True)
                )
                await asyncio.gather(*(environment.claim(first) for _ in range(4)))
                assert (await step.look_at_nodes(first))["k0"]["owner"] == works[0].folder.id
                only = StepChoice(skip=("preflight", "cache", "weights", "proof"))
                for refused in (order.up(second, only), environment.roll_back(second)):
                    with pytest.raises(ConfigError, match=r"another deployment on .*/share has the name t: ") as error:
                        await refused
                    assert "rm " + str(tmp_path / "share" / "gracefarm" / "t" / "owner") in error.value.remedy
                assert second.keeper.state.steps == {}
                (tmp_path / "share" / "gracefarm" / "t" / "owner").unlink()
                await environment.claim(second)
        assert sorted(path.name for path in (tmp_path / "share" / "gracefarm" / "t").iterdir()) == ["owner"]

    asyncio.run(go())
