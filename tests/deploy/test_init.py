"""`deploy init`, `facts` and `plan` as a person calls them, over real SSH to nodes that run real commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from deploy import cli
from deploy.cli.plan import schemas
from deploy.fleet.calls import RemoteNode
from deploy.nodes import state, template
from deploy.nodes.config import Access, Config, ModelConfig
from deploy.nodes.deployment import Deployment, Folder, load_deployment
from deploy.nodes.facts import Facts, load_facts
from deploy.planning import hardware, models, plans, suppose
from deploy.rehearsal import hub
from deploy.steps import missing, setlock
from gracefarm import pins
from gracefarm.console import Console
from gracefarm.errors import GracefarmError, SshError
from tests.deploy.servers import Servers, servers

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Servers]:
    (tmp_path / "nodes").mkdir()
    with servers(tmp_path / "nodes", 2) as running:
        (tmp_path / "ips.txt").write_text("# the head first\n" + "\n".join(running.addresses) + "\n")
        yield running


def deploy(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process, for a new one takes a second or two to import what it needs."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    variables = {"HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "160", "CI": "1", **more}
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", ["deploy", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def init(folder: Path, nodes: Servers, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return deploy(folder, "init", "ips.txt", "--user", "tester", "--port", str(nodes.port), *more, **variables)


def test_without_a_terminal_keys_are_shown_and_nothing_is_trusted(tmp_path: Path, nodes: Servers) -> None:
    done = init(tmp_path, nodes)
    assert done.returncode == 60
    for key in nodes.keys.values():
        assert key.get_fingerprint() in done.stderr
    assert "--accept" in done.stderr
    assert not (tmp_path / ".deploy" / "known_hosts").exists()


def test_accepted_keys_are_pinned_facts_are_kept_and_a_second_time_changes_nothing(tmp_path: Path, nodes: Servers) -> None:
    done = init(tmp_path, nodes, "--accept")
    assert done.returncode == 0, done.stderr
    deployment = load_deployment(tmp_path / "deploy.toml")
    assert [node.address for node in deployment.nodes] == nodes.addresses
    assert (tmp_path / ".deploy").stat().st_mode & 0o077 == 0
    kept = json.loads((tmp_path / ".deploy" / "facts.json").read_text())
    head = kept["nodes"][0]
    assert (head["private"], head["interface"], head["arch"]) == (nodes.addresses[0], "lo", os.uname().machine)
    assert head["memory"]["total"] > head["memory"]["available"] > 1 << 28
    assert head["page"] == os.sysconf("SC_PAGE_SIZE")
    assert head["glibc"] == os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]
    assert abs(head["clock_s"]) < 2
    before = (tmp_path / "deploy.toml").read_bytes(), (tmp_path / ".deploy" / "known_hosts").read_bytes()
    again = init(tmp_path, nodes)
    assert again.returncode == 0, again.stderr
    assert "2 pinned" in again.stderr
    assert "ignored" not in again.stderr  # the same words as in deploy.toml
    other = init(tmp_path, nodes, "--key", "k", "--share", "/srv", "--user", "other")
    told = " ".join(other.stderr.split())
    assert 'deploy.toml has no `key`; add `key = "k"` to [nodes]' in told
    assert 'deploy.toml has no `share`; add `share = "/srv"` to the lines above [nodes]' in told
    assert 'deploy.toml has `user = "tester"`; change it to `user = "other"` in [nodes]' in told
    for file in ([], ["deploy.toml"]):
        named = deploy(tmp_path, "init", *file, "--user", "other", "--model", "a/b")
        told = " ".join(named.stderr.split())
        assert "--user ignored: " in told
        assert "--model ignored: " in told
    assert before == ((tmp_path / "deploy.toml").read_bytes(), (tmp_path / ".deploy" / "known_hosts").read_bytes())


def test_what_is_written_is_ten_lines_that_can_be_served_today(tmp_path: Path, nodes: Servers) -> None:
    done = init(tmp_path, nodes, "--accept", "--model", "Qwen/Qwen3-32B", "--share", "/srv/share")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "deploy.toml").read_text()
    assert len(text.splitlines()) == 12  # ten, and how these nodes are entered
    deployment = load_deployment(tmp_path / "deploy.toml")
    data = deployment.data
    proposed = {"aarch64": "gh200-cu130", "x86_64": "x86_64-cu130"}[os.uname().machine]
    assert (data.name, data.engine, data.set, data.model.repo) == ("qwen3-32b", "vllm", proposed, "Qwen/Qwen3-32B")
    assert f"http://HOST:8080/{proposed}/simple/" in text
    assert "missing  wheels" not in done.stderr
    (page,) = re.findall(r"docs/\S+\.md", text)
    assert all(f"| `{key}` |" in (ROOT / page).read_text() for key in type(data).model_fields)
    lock = setlock.lock_text(deployment, Console())
    setlock.require_engine(deployment, lock)
    assert not [pin.text for pin in pins.parse(lock, "the lock") if "+" in pin.version]  # no wheel that the builder built
    assert (tmp_path / f"{proposed}.lock").read_text() == lock


def test_the_set_is_proposed_by_the_architecture_unless_a_person_has_chosen(tmp_path: Path) -> None:
    def written(name: str, **changes: str) -> Deployment:
        path = tmp_path / name / "deploy.toml"
        path.parent.mkdir()
        (path.parent / "ips.txt").write_text("127.0.0.1\n")
        template.write_config(path.parent / "ips.txt", path, access=Access())
        for old, new in changes.items():
            path.write_text(path.read_text().replace(old, new))
        return load_deployment(path)

    new = written("new")
    assert template.propose_set(new, {"aarch64"}) is None
    assert template.propose_set(new, {"aarch64", "x86_64"}) is None
    assert template.propose_set(new, {"riscv64"}) is None
    assert template.propose_set(new, {"x86_64"}) == "x86_64-cu130"
    assert load_deployment(new.path).data.set == "x86_64-cu130"
    assert template.propose_set(load_deployment(new.path), {"x86_64"}) is None
    own_index = written("index", **{"# index": "index"})
    own_lock = written("lock", **{"[nodes]": 'lock = "own.lock"\n[nodes]'})
    own_file = written("file")
    (own_file.path.parent / "gh200-cu130.lock").write_text("")
    for chosen in (own_index, own_lock, own_file):
        before = chosen.path.read_text()
        assert template.propose_set(chosen, {"x86_64"}) is None
        assert chosen.path.read_text() == before


@pytest.mark.parametrize(
    ("architectures", "engine", "remedy"),
    [
        (("x86_64",), "vllm", 'change `set` in deploy.toml to "x86_64-cu130"'),
        (("aarch64", "x86_64"), "vllm", "use a separate deployment for the x86_64 nodes"),
        (("x86_64",), "aphrodite", "the lock of a set that you built for x86_64"),
    ],
)
def test_the_remedy_for_missing_wheels_names_a_set_that_exists(
    tmp_path: Path, architectures: tuple[str, ...], engine: str, remedy: str
) -> None:
    data = Config.model_validate({"engine": engine, "set": "gh200-cu130", "share": "/srv"})
    deployment, facts = suppose.suppose(
        hardware.named("h200"), len(architectures), Deployment(path=tmp_path / "deploy.toml", data=data, nodes=())
    )
    nodes = [node.model_copy(update={"arch": arch}) for node, arch in zip(facts.nodes, architectures, strict=True)]
    (entry,) = missing.missing(deployment, Facts(nodes=tuple(nodes)), {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert entry.startswith(
        f"wheels for x86_64 on k{len(architectures) - 1}: the set gh200-cu130 has only wheels for aarch64; "
    )
    assert remedy in entry


def test_all_that_is_missing_is_listed_at_once(tmp_path: Path, nodes: Servers) -> None:
    with hub.serving({}, repo="org/gated", gated=True) as served:
        variables = {"HF_ENDPOINT": served.url, "HF_TOKEN": ""}
        done = init(tmp_path, nodes, "--accept", "--model", "org/gated", **variables)
        assert done.returncode == 0, done.stderr
        told = [line.split("missing")[1].strip() for line in done.stderr.splitlines() if line.startswith("  missing")]
        assert [sentence.partition(":")[0] for sentence in told] == [
            "a shared folder",
            "a usable GPU on k0, k1",
            "access to org/gated",
        ]
        assert "when nothing is missing, run `deploy serve`" in done.stderr
        (tmp_path / "deploy.toml").write_text((tmp_path / "deploy.toml").read_text().replace("org/gated", "org/absent"))
        with (tmp_path / "deploy.toml").open("a") as stream:
            stream.write("[options]\nrehearsal = true\n")
        again = deploy(tmp_path, "init", "deploy.toml", "--json", **variables)
        assert "usable GPU" not in again.stdout
        assert (
            "the model: org/absent is not accessible on the Hub without a token"
            in json.loads(again.stdout.splitlines()[-1])["missing"][-1]
        )


@pytest.mark.parametrize(("answer", "code", "share"), [("n", 60, ""), ("y", 0, "/srv/share")])
def test_on_a_terminal_it_asks(tmp_path: Path, nodes: Servers, answer: str, code: int, share: str) -> None:
    """It asks for the model, for the shared folder (again, if the path is not absolute), and whether to trust the keys."""
    questions = {"Model on the Hub": "org/model", "Shared folder": "srv", "Shared folder ": share, "consoles show": answer}
    master, slave = pty.openpty()
    command = ["init", "ips.txt", "--user", "tester", "--port", str(nodes.port)]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    env.pop("CI", None)
    with subprocess.Popen(
        [sys.executable, "-m", "deploy", *command], cwd=tmp_path, env=env, stdin=slave, stdout=slave, stderr=slave
    ) as running:
        os.close(slave)
        said = b""
        for question, reply in questions.items():
            said = b""
            while question.encode() not in said:
                said += os.read(master, 4096)
            os.write(master, reply.encode() + b"\n")
        assert all(key.get_fingerprint().encode() in said for key in nodes.keys.values())
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while os.read(master, 4096):
                pass
        assert running.wait(60) == code
    os.close(master)
    assert (tmp_path / ".deploy" / "known_hosts").exists() == (code == 0)
    data = load_deployment(tmp_path / "deploy.toml").data
    assert (data.model.repo, data.share) == ("org/model", share or None)


def test_a_jump_host_is_trusted_first_and_then_what_is_behind_it(tmp_path: Path, nodes: Servers) -> None:
    """The second server is the way to the first; its key is asked about, pinned, and refused when it changes."""
    first, way = nodes.addresses
    (tmp_path / "ips.txt").write_text(first + "\n")
    jump = ["--jump", f"tester@{way}:{nodes.port}"]
    done = init(tmp_path, nodes, *jump)
    assert done.returncode == 60
    assert nodes.keys[way].get_fingerprint() in done.stderr
    assert nodes.keys[first].get_fingerprint() not in done.stderr
    done = init(tmp_path, nodes, *jump, "--accept")
    assert done.returncode == 0, done.stderr
    assert "2 new" in done.stderr
    assert nodes.tunnels == [(first, nodes.port)] * len(nodes.tunnels) != []
    nodes.do(nodes.stop(way))
    nodes.do(nodes.start(way))
    assert init(tmp_path, nodes, *jump, "--accept").returncode == 60


def test_another_host_key_is_refused_until_a_person_says_repin(tmp_path: Path, nodes: Servers) -> None:
    assert init(tmp_path, nodes, "--accept").returncode == 0
    nodes.do(nodes.stop(nodes.addresses[1]))
    nodes.do(nodes.start(nodes.addresses[1]))
    for command in (("init", "deploy.toml", "--accept"), ("facts",)):
        done = deploy(tmp_path, *command)
        assert done.returncode == 60
        assert "--repin" in done.stderr
    asked = deploy(tmp_path, "init", "deploy.toml", "--repin")
    assert asked.returncode == 60
    assert nodes.keys[nodes.addresses[1]].get_fingerprint() in asked.stderr
    assert deploy(tmp_path, "init", "deploy.toml", "--repin", "--accept").returncode == 0
    assert deploy(tmp_path, "facts").returncode == 0


def test_a_key_that_the_user_trusts_already_needs_no_question(tmp_path: Path, nodes: Servers) -> None:
    own = tmp_path / "home" / ".ssh"
    own.mkdir(parents=True)
    lines = [f"[{name}]:{nodes.port} {key.export_public_key().decode().strip()}" for name, key in nodes.keys.items()]
    (own / "known_hosts").write_text("\n".join(lines) + "\n")
    done = init(tmp_path, nodes)
    assert done.returncode == 0, done.stderr
    assert "2 known" in done.stderr


def test_where_no_node_answers_all_that_is_missing_is_listed_too(
    tmp_path: Path, nodes: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert init(tmp_path, nodes, "--accept").returncode == 0

    async def refused(deployment: Deployment, asked: Sequence[RemoteNode]) -> tuple[Facts, dict[str, GracefarmError]]:
        return Facts(nodes=()), {node.name: SshError(f"{node.name}: ssh refused the key") for node in asked}

    monkeypatch.setattr("deploy.cli.init.probe_nodes", refused)
    for command in ("init", "deploy.toml"), ("facts",):
        done = deploy(tmp_path, *command)
        assert done.returncode == 60
        assert done.stdout == ""
        assert "2 of 2 nodes failed: k0, k1: ssh refused the key" in done.stderr
        assert ("missing  a shared folder: set share in deploy.toml to" in done.stderr) == (command[0] == "init")


def test_a_node_that_is_down_is_named_and_the_others_are_kept(tmp_path: Path, nodes: Servers) -> None:
    nodes.do(nodes.stop(nodes.addresses[1]))
    done = init(tmp_path, nodes, "--accept")
    assert done.returncode == 60
    assert f"k1 {nodes.addresses[1]}:{nodes.port} cannot be reached" in done.stderr
    assert [node["name"] for node in json.loads((tmp_path / ".deploy" / "facts.json").read_text())["nodes"]] == ["k0"]
    planned = deploy(tmp_path, "plan")
    assert planned.returncode == 3
    assert "no facts of node k1" in planned.stderr


def test_facts_can_be_read_again_without_asking(tmp_path: Path, nodes: Servers) -> None:
    assert init(tmp_path, nodes, "--accept").returncode == 0
    for address in list(nodes.running):
        nodes.do(nodes.stop(address))
    kept = deploy(tmp_path, "facts", "--kept", "--json")
    assert [node["name"] for node in json.loads(kept.stdout)["nodes"]] == ["k0", "k1"]
    lost = deploy(tmp_path, "facts")
    assert lost.returncode == 60
    assert len(json.loads((tmp_path / ".deploy" / "facts.json").read_text())["nodes"]) == 2  # what was known stays


def test_a_mistake_in_deploy_toml_is_one_sentence_for_all_nodes(tmp_path: Path, nodes: Servers) -> None:
    assert init(tmp_path, nodes, "--accept").returncode == 0
    done = deploy(tmp_path, "serve")
    assert done.returncode == 3
    told = " ".join(done.stderr.split())
    assert told.count("the key `share` is missing") == 1
    assert "nodes failed" not in told


def test_a_head_without_a_gpu_is_a_sentence(tmp_path: Path, nodes: Servers) -> None:
    assert init(tmp_path, nodes, "--accept", "--share", "/srv/share").returncode == 0
    kept = tmp_path / ".deploy" / "facts.json"
    found = json.loads(kept.read_text())
    for node in found["nodes"]:
        node["cuda"] = {"absent": True}
    kept.write_text(json.dumps(found))
    done = deploy(tmp_path, "plan")
    assert done.returncode == 64
    assert "head has no usable GPU (no NVIDIA driver)" in done.stderr
    assert "put a node with a GPU in the first place in ips.txt, or repair the NVIDIA driver" in " ".join(done.stderr.split())


def test_the_commit_whose_weights_were_brought_is_the_one_that_is_planned(tmp_path: Path, nodes: Servers) -> None:
    """And `deploy serve`, which plans with the config.json of those weights, comes to the same plan."""
    assert init(tmp_path, nodes, "--accept", "--share", "/srv/share").returncode == 0
    with (tmp_path / "deploy.toml").open("a") as stream:
        stream.write("[options]\nrehearsal = true\n")
    text = (tmp_path / "deploy.toml").read_text().replace("Llama-3.1-405B-Instruct", "Llama-3.1-8B-Instruct")
    (tmp_path / "deploy.toml").write_text(text)
    folder = Folder(path=tmp_path / ".deploy")
    data = {"commit": "ab" * 20, "folder": "/srv/share/x"}
    record = state.StepRecord(digest="x", outcome="done", begun=0, data=data)
    folder.state.write_text(state.State(steps={"weights": record}).model_dump_json())
    done = deploy(tmp_path, "plan", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["revision"] == "ab" * 20
    deployment = load_deployment(tmp_path / "deploy.toml")
    model = models.built_in("meta-llama/Llama-3.1-8B-Instruct", "ab" * 20)
    assert model
    assert plans.make(deployment, load_facts(deployment), model.model_copy(update={"source": "the share"})).id == shown["id"]


# plan, without any node


def test_supposed_nodes_need_nothing(tmp_path: Path) -> None:
    done = deploy(tmp_path, "plan", "--nodes", "10", "--gpu", "gh200-96", "--commands")
    assert done.returncode == 0, done.stderr
    for words in (
        "tp2 pp5 on 10 nodes",
        "tp4 pp2",
        "25,26,25x3",
        "VLLM_HOST_IP=10.0.0.1",
        "VLLM_PP_LAYER_PARTITION=25,26,25,25,25",
        "ray start --head",
        "tp3, tp5, tp6, tp7, tp9, tp10   vllm splits evenly, but 128 attention heads are not divisible by tp",
        "not measured",
    ):
        assert words in done.stdout
    assert "ray start" not in deploy(tmp_path, "plan", "--nodes", "10").stdout
    other = deploy(tmp_path, "plan", "--nodes", "10", "--engine", "aphrodite")
    assert "tp5 pp2 on 10 nodes" in other.stdout
    assert "requires that tp is a multiple of this number" in other.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]  # nothing is written


def test_plan_assumes_what_init_writes(tmp_path: Path) -> None:
    written = tomllib.loads(template.render("ips.txt", access=Access(), share=None, repo=ModelConfig().repo))
    shown = json.loads(deploy(tmp_path, "plan", "--nodes", "3", "--json").stdout)
    assert (shown["deployment"], shown["engine"]) == (written["name"], written["engine"])
    assert shown["model"] == written["model"]["repo"]


def test_a_deploy_toml_without_an_engine_means_what_it_meant_and_says_so(tmp_path: Path) -> None:
    nodes = '[nodes]\nhosts = ["127.0.0.9"]\n'
    for text, noted in ((nodes, True), ('engine = "aphrodite"\n' + nodes, False)):
        (tmp_path / "deploy.toml").write_text(text)
        done = deploy(tmp_path, "plan", "--nodes", "10")
        assert "llama-405b  meta-llama/Llama-3.1-405B-Instruct at main, aphrodite" in done.stdout
        assert ("has no `engine`, so the plan is for aphrodite" in done.stderr) == noted
    data = load_deployment(tmp_path / "deploy.toml").data
    assert data.set == "gh200-cu124"


def test_json_is_the_plan_and_equal_each_time(tmp_path: Path) -> None:
    first, second = (deploy(tmp_path, "plan", "--nodes", "3", "--json") for _ in range(2))
    shown = json.loads(first.stdout)
    assert first.stdout == second.stdout
    assert (shown["layout"]["pp"], shown["layout"]["offload_gib"]) == (3, 172.3)
    assert [level["streams"] for level in shown["prediction"]["levels"]] == [1, 4, 16]


def test_whole_experts_are_planned_or_refused_as_the_option_says(tmp_path: Path) -> None:
    model = ("plan", "--nodes", "2", "--gpu", "h200", "--model", "Qwen/Qwen3-235B-A22B", "--json")
    layouts = [json.loads(deploy(tmp_path, *model, *option).stdout)["layout"] for option in ((), ("--ep",), ("--no-ep",))]
    assert [layout["expert_parallel"] for layout in layouts] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--nodes", "2"), 64, "the maximum is 60%"),
        (("--nodes", "12", "--engine", "aphrodite", "--tp", "11"), 64, "requires that tp is a multiple of this number"),
        (("--nodes", "10", "--engine", "vllm", "--tp", "5"), 64, "are not divisible by 5"),
        (("--nodes", "10", "--gpu", "mi300"), 2, "unknown kind of node 'mi300'"),
        (("--tp", "5"), 2, "add --nodes N"),
        (("--no-ep",), 2, "add --nodes N"),
        ((), 3, "no deploy.toml"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_a_code(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = deploy(tmp_path, "plan", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_is_all_that_shell_prints(tmp_path: Path) -> None:
    done = deploy(tmp_path, "plan", "--nodes", "10", "--shell")
    assert done.stdout.startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_committed_schemas_are_those_of_the_code() -> None:
    for name, text in schemas().items():
        committed = (ROOT / "docs" / "schema" / f"{name}.json").read_text()
        assert json.loads(committed) == json.loads(text), f"run `deploy schema --write docs/schema` for {name}"


def test_ctrl_c_ends_it_with_130_and_no_traceback(tmp_path: Path) -> None:
    """While it waits for a node that accepts and never speaks."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (tmp_path / "deploy.toml").write_text(
            f'[[node]]\naddress = "127.0.0.1"\nport = {silent.getsockname()[1]}\n[options]\nconnect_timeout = 60\n'
        )
        running = subprocess.Popen(
            [sys.executable, "-m", "deploy", "init", "deploy.toml"],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            running.send_signal(signal.SIGINT)
            _out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err


def test_help_imports_no_command(tmp_path: Path) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from deploy.cli import cli\n"
        "done = CliRunner().invoke(cli, ['--help']); assert 'plan' in done.output, done.output\n"
        "heavy = [one for one in ('asyncssh', 'httpx', 'deploy.cli.plan', 'deploy.cli.init') if one in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
