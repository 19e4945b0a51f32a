"""The bundle: whole, without a secret wherever one was planted, with the first cause on top; also while nodes are away."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from deploy.fleet.ssh import open_fleet
from deploy.nodes.redact import Redactor
from deploy.nodes.state import State, StepRecord
from deploy.planning.plans import ServePlan
from deploy.remote import gather, stacks
from deploy.steps import engine
from deploy.watch import collect
from deploy.watch.collect import Finding, findings
from deploy.watch.status import NodeStatus, Service, Status
from gracefarm.errors import EngineError
from tests.deploy.scene_kit import Scene, play, ray_logs
from tests.deploy.test_engine_step import a_plan
from tests.deploy.test_tunnel import deploy

HF = "hf_" + "AbCdEfGhIj" * 3 + "KLMN"
RAY = "c0ffee" * 10
OTHER = "sk-somebody-elses-key-0123456789"
FORMS = (
    *("gf_" + "aB3_x-" * 7 + "z", "ghp_" + "aB3x" * 9, "AKIA" + "IOSFODNN7EXAMPLE", "glpat-" + "aB3x" * 5),
    "github_pat_" + "aB3x" * 6,
    *("xoxb-123456789012-" + "abcdef1234" * 2, "sk_live_" + "aB3x" * 6),
)
"Tokens of services, which detect-secrets knows by their form; gracefarm's own first."
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


def unpacked(path: Path, into: Path) -> dict[str, bytes]:
    """Members below the archive's only folder."""
    with tarfile.open(path) as tar:
        tar.extractall(into, filter="data")
    (root,) = into.iterdir()
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def forms(secret: str) -> list[bytes]:
    """As it may stand anywhere."""
    return [secret.encode(), quote(secret).encode(), base64.b64encode(secret.encode()).rstrip(b"=")[:-1]]


def planted(key: str) -> str:
    """Lines as programs write them."""
    return "\n".join(
        [
            f"INFO args: Namespace(api_keys='{key}', host='127.0.0.1')",
            f"Authorization: Bearer {key}",
            f'{{"authorization": "Bearer {OTHER}", "x-api-key": "{key}"}}',
            f"curl -H 'Authorization: Basic {base64.b64encode(key.encode()).decode()}' http://127.0.0.1:2242",
            f"HF_TOKEN={HF} hf download; token {HF}",
            f'env: {{"HUGGING_FACE_HUB_TOKEN": "{HF}", "RAY_AUTH_TOKEN": "{RAY}"}}',
            f"GET https://user:{RAY}@hub.example/model?token={quote(key)}",
            f"aphrodite run m --api-keys {OTHER} --port 2242",
            PRIVATE,
            "RAY_AUTH_TOKEN_PATH=/tmp/gf/ray-token tokens: 70 prompt_tokens=12 generation_tokens_total 99",
        ]
    )


def test_no_secret_of_any_log_is_in_the_bundle_and_the_first_cause_is_on_top(tmp_path: Path) -> None:
    words = tmp_path / "words"

    async def work(made: Scene) -> None:
        key = engine.api_key(made.deployment.folder)
        folder = made.deployment.folder
        (folder.path / "ray-token").write_text(RAY + "\n")
        words.write_text(
            planted(key) + "\ntorch.OutOfMemoryError: CUDA out of memory.\nTraceback:\nActorDiedError: a worker died\n"
        )
        with pytest.raises(EngineError):
            await made.serve()
        logs = ray_logs(made, "session_2026-11-24_1")
        (logs / "raylet.out").write_text(planted(key))
        (logs / "worker-1.err").write_text(planted(key))
        (logs / "old").mkdir()
        (logs / "old" / f"job-{key}.log").write_text(planted(key))
        # A long log, with a secret in each of its lines: also where its middle is cut out.
        (logs / "gcs_server.out").write_text(f"Bearer {key} {'x' * 200}\n" * 25_000)
        (folder.logs / "engine.log").write_text(planted(key))
        state = json.loads(folder.state.read_text())
        state["steps"]["engine"]["text"] += f" {HF} {key}"
        folder.state.write_text(json.dumps(state))
        with made.deployment.path.open("a") as stream:
            stream.write(f'\n# token = "{HF}"\n')
        (tmp_path / "here").mkdir()
        async with deploy(tmp_path, "collect", "--into", "here") as process:
            out, err = await asyncio.wait_for(process.communicate(), 90)
            assert process.returncode == 0, err.decode()
        text = out.decode() + err.decode()
        assert "first cause  GPU memory ran out" in text
        (path,) = (tmp_path / "here").iterdir()
        assert path.stat().st_mode & 0o077 == 0
        files = unpacked(path, tmp_path / "out")
        names = set(files)
        assert {"summary.md", "status.json", "local/deploy.toml", "local/deploy/state.json", "local/deploy/plan.json"} <= names
        assert {"local/deploy/logs/engine.log", "nodes/k0/jobs/engine/log", "nodes/k0/dmesg-gpu.txt"} <= names
        assert {"nodes/k0/processes.txt", "nodes/k0/nvidia-smi.txt"} <= names
        session = "nodes/k0/ray/session_2026-11-24_1/logs"
        assert {f"{session}/raylet.out", f"{session}/worker-1.err", f"{session}/old/job-[redacted].log"} <= names
        assert b"bytes left out" in files[f"{session}/gcs_server.out"]
        assert b"prompt_tokens=12 generation_tokens_total 99" in files[f"{session}/raylet.out"]
        for secret in (key, HF, RAY, OTHER, "b3BlbnNzaC1rZXktdjE"):
            for form in forms(secret):
                found = [name for name, content in files.items() if form in content or form in name.encode()]
                assert not found, (secret, form, found)
                assert form.decode() not in text
        page = files["summary.md"].decode()
        assert page.startswith("# t: FAILED(loading)")
        assert page.index("GPU memory ran out") < page.index("## ")
        assert "Source: nodes/k0/jobs/engine/log" in page

    play(tmp_path, work, "--die", "1", "--say", str(words))


@pytest.mark.parametrize("name", ["state.json", "plan.json", "facts.json"])
@pytest.mark.parametrize("content", [b'{"steps": ', b"\xff\xfe", b"[]"])
def test_a_bundle_is_made_where_what_is_kept_here_is_damaged(tmp_path: Path, name: str, content: bytes) -> None:
    async def work(made: Scene) -> None:
        made.keep("failed", "Ray lost k1")
        (made.deployment.folder.path / name).write_bytes(content)
        async with open_fleet(made.deployment, config=[]) as fleet:
            bundle = await collect.write_bundle(made.deployment, fleet, tmp_path, environ={})
        files = unpacked(bundle.path, tmp_path / "out")
        assert files[f"local/deploy/{name}"] == content
        assert {"nodes/k0/processes.txt", "local/deploy.toml"} <= set(files)
        page = files["summary.md"].decode()
        assert page.startswith("# t: FAILED(")
        assert f"Not read: {made.deployment.folder.path / name}" in page
        (note,) = bundle.status.notes
        assert "; " in note  # what to do

    play(tmp_path, work)


def test_half_a_secret_is_not_left_at_a_cut(tmp_path: Path) -> None:
    """A long log's middle is left out at the ends of lines: half of a key looks like nothing."""
    log = tmp_path / "log"
    line = b"Bearer gf-" + b"k" * 90 + b"\n"
    log.write_bytes(line * ((gather.HEAD + gather.TAIL) // len(line) + 500))
    kept = gather.ends(log)
    assert {len(kept_line) for kept_line in kept.splitlines() if not kept_line.startswith(b"[... ")} == {len(line) - 1}
    left = int(kept.split(b"[... ")[1].split()[0])
    marker = len(b"[... %d bytes left out ...]\n" % left)
    assert len(kept) - marker + left == log.stat().st_size


def test_a_bundle_is_made_while_nodes_are_away(tmp_path: Path) -> None:
    async def work(made: Scene) -> None:
        made.keep("failed", "Ray lost k1")
        await made.made[1].switch_off()
        async with open_fleet(made.deployment, config=[]) as fleet:
            bundle = await collect.write_bundle(made.deployment, fleet, tmp_path, environ={})
        assert list(bundle.missing) == ["k1"]
        (away,) = [finding for finding in bundle.findings if finding.rank == 2]
        assert away.where == "k1"
        files = unpacked(bundle.path, tmp_path / "out")
        assert "nodes/k0/processes.txt" in files
        assert b"## Missing" in files["summary.md"]
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".deploy"]  # noqa: ASYNC240

    play(tmp_path, work, nodes=2)


# causes

OOM = b"torch.OutOfMemoryError: CUDA out of memory. Tried\nActorDiedError: died\n"
DIED = b"ray.exceptions.ActorDiedError: The actor died\nRuntimeError: Engine is gone\n"
NOW = time.time()


def kernel(seconds: float) -> bytes:
    when = time.strftime("%Y-%m-%dT%H:%M:%S,123456+00:00", time.gmtime(NOW + seconds))
    return f"{when} NVRM: Xid (PCI:0009:01:00): 79, pid=1, GPU has fallen off the bus.\n".encode()


def killed(name: str) -> bytes:
    return f"Out of memory: Killed process 77 ({name}) total-vm:1kB\n".encode()


def first(
    texts: dict[str, bytes],
    *,
    word: str = "DEAD",
    lost: bool = False,
    silence: float = 0.0,
    text: str = "",
    plan: ServePlan | None = None,
    **failed: str,
) -> tuple[Finding, ...]:
    nodes = tuple(NodeStatus(name=name, address=name, ray=name != "k1" if lost else None) for name in ("k0", "k1"))
    service = Service(word=word, text=text)  # type: ignore[arg-type]
    seen = Status(taken=NOW, deployment="t", model="m", service=service, nodes=nodes)
    steps = {"engine": StepRecord(digest="", outcome="failed", text="the last and least", begun=NOW - 60)}
    steps |= {name: StepRecord(digest="", outcome="failed", text=words, begun=NOW) for name, words in failed.items()}
    named = {f"nodes/{name}": content for name, content in texts.items()}
    return findings(named, seen, State(steps=steps), plan or a_plan(1), {}, silence=silence)


EARLIER, SESSION = "k1/ray/session_2026-11-24_1/logs", "k1/ray/session_2026-11-24_2/logs"


@pytest.mark.parametrize(
    ("texts", "more", "words"),
    [
        ({"k0/jobs/engine/log": OOM, "k1/dmesg-gpu.txt": kernel(0)}, {}, "GPU memory ran out"),
        ({"k0/jobs/engine/log": DIED, "k1/dmesg-gpu.txt": kernel(0)}, {}, "k1: GPU error Xid 79"),
        ({"k0/jobs/engine/log": DIED, "k1/dmesg-gpu.txt": kernel(-86400)}, {}, "a worker died"),
        ({"k0/jobs/engine/log": DIED, f"{SESSION}/worker-7.err": OOM}, {}, "k1: GPU memory ran out"),
        (
            {"k0/jobs/engine/log": DIED, f"{EARLIER}/worker-7.err": OOM, f"{SESSION}/worker-9.err": b""},
            {},
            "a worker died",
        ),
        ({"k0/jobs/engine/log": DIED}, {"lost": True}, "Ray lost k1"),
        ({"k0/jobs/engine/log": b"x\n", "k0/jobs/engine/exit": b"137\n"}, {}, "SIGKILL"),
        ({"k0/jobs/engine/log": b"NCCL error: unhandled\n", "k1/dmesg-gpu.txt": kernel(5)}, {}, "Xid 79"),
        ({"k0/jobs/engine/log": b"NCCL error: unhandled\n"}, {}, "NCCL could not"),
        ({"k0/jobs/engine/log": DIED, "k1/dmesg-gpu.txt": killed("ray::RayWorker")}, {}, "k1: the kernel"),
        ({"k0/jobs/engine/log": DIED, "k1/dmesg-gpu.txt": killed("cc1plus")}, {}, "a worker died"),
        ({}, {"word": "FAILED"}, "step engine failed: the last and least"),
    ],
)
def test_the_first_cause_and_not_the_last_word(texts: dict[str, bytes], more: dict[str, object], words: str) -> None:
    found = first(texts, **more)  # type: ignore[arg-type]
    assert words in found[0].text, found


def test_a_kernel_message_has_the_remedy_of_its_kind() -> None:
    def remedy(messages: bytes) -> str:
        return first({"k0/jobs/engine/log": DIED, "k1/dmesg-gpu.txt": messages})[0].remedy

    assert "list of Xid errors" in remedy(kernel(0))
    assert "host memory was full" in remedy(killed("ray::RayWorker"))
    check = kernel(0).split()[0] + b" mce: [Hardware Error]: Machine check events logged\n"
    assert remedy(check) == "reboot the node; if the error returns, replace the node"


def test_without_ray_a_part_that_has_ended_comes_before_the_silence_of_the_engine_that_waits_for_it() -> None:
    """On two H200 the head's log ended with a request that was answered: vLLM's own start of several nodes misses no part."""
    before = a_plan(1)
    second = next(node for node in before.nodes if node.name == "k1")
    nodes = (before.nodes[0], second.model_copy(update={"ray": (), "engine": ("vllm",)}))
    plan = before.model_copy(update={"launcher": "native", "nodes": nodes})
    answered = b'(APIServer pid=107) INFO:     127.0.0.1:52400 - "GET /metrics HTTP/1.1" 200 OK\n'
    part = b"ERROR 11-29 06:27:38 [multiproc_executor.py:284] Worker proc VllmWorker-1 died unexpectedly, shutting down\n"
    texts = {"k0/jobs/engine/log": answered, "k1/jobs/engine/log": part, "k1/jobs/engine/exit": b"0\n"}
    assert first(texts, plan=plan)[0].text == "the engine on k1 has ended"
    alone = first({**texts, "k0/jobs/engine/exit": b"1\n", "k0/jobs/engine/log": DIED}, plan=plan)
    assert "a worker died" in alone[0].text, "where the head has ended too, its own words count"


STACKS = b"""Process 71: ray::RayWorkerWrapper
Python v3.11.9 (/share/env/bin/python3.11)

Thread 88 (idle): "Thread-1"
    wait (threading.py:320)
Thread 71 (active): "MainThread"
    all_reduce (torch/distributed/distributed_c10d.py:2800)
    execute_method (worker.py:1)
"""
QUIET = b"INFO: driver_ip: 10.0.0.11\nINFO: waiting for the others\n"


@pytest.mark.parametrize("word", ["WEDGED", "LOADING"])
def test_an_engine_that_hangs_is_told_by_its_phase_its_last_words_and_its_stacks(word: str) -> None:
    texts = {"k0/jobs/engine/log": QUIET, "k0/stacks.txt": b"(no py-spy)\n", "k1/stacks.txt": STACKS}
    found = first(texts, word=word, silence=300.0)
    (hangs,) = [finding for finding in found if finding.where == "engine" and finding.file]
    assert hangs.text.startswith(
        "no cause found; the engine was in phase `placing`; the last line of its log: INFO: waiting for the others"
    )
    assert "no output for 300 s" in hangs.text
    assert "k1: all_reduce (torch/distributed/distributed_c10d.py:2800) in process 71" in hangs.text
    assert not [finding for finding in first(texts, word="LOADING", silence=5.0) if finding.file]


def test_what_a_log_says_after_deploy_has_stopped_it_is_no_cause() -> None:
    """After load_timeout a worker's end, which `deploy` itself had brought about, was the first cause."""
    found = first({"k0/jobs/engine/log": DIED, "k0/jobs/engine/exit": b"stopped\n"}, word="STOPPED")
    assert [finding.text for finding in found] == ["step engine failed: the last and least"]
    found = first({"k0/jobs/engine/log": OOM, "k0/jobs/engine/exit": b"stopped\n"}, word="STOPPED")
    assert "memory" in found[0].text


def test_an_engine_that_cannot_be_asked_is_no_dead_one() -> None:
    found = first({"k0/jobs/engine/log": DIED}, word="UNREACHABLE", text="the engine is running but cannot be reached: sshd")
    assert found[0].text == "the engine is running but cannot be reached: sshd"
    assert not [finding for finding in found if "a worker died" in finding.text]


def test_stacks_are_those_of_the_engines_ranks(tmp_path: Path) -> None:
    """Real py-spy on a real process of a job."""
    program = tmp_path / "python-rank"
    program.symlink_to(sys.executable)
    (tmp_path / "waits.py").write_text("import time\n\n\ndef all_reduce():\n    time.sleep(60)\n\n\nall_reduce()\n")
    mark = f"t{os.getpid()}/k0/"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "py-spy").symlink_to(Path(sys.executable).with_name("py-spy"))
    environ = {**os.environ, "GRACEFARM_MARK": f"{mark}engine"}
    with subprocess.Popen([program, tmp_path / "waits.py"], env=environ, start_new_session=True) as rank:
        try:
            deadline = time.monotonic() + 20
            while "all_reduce" not in (said := stacks.dump(mark, str(tmp_path))) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert collect.places(said) == [f"all_reduce (waits.py:5) in process {rank.pid}"]
            assert stacks.dump(f"{mark}other", str(tmp_path)) == "(no processes of an engine)\n"
        finally:
            rank.kill()


def test_an_engine_that_answers_has_no_cause_of_death() -> None:
    found = first({"k0/jobs/engine/log": OOM, f"{SESSION}/worker-7.err": OOM}, word="READY")
    assert not [finding for finding in found if "memory" in finding.text]


# redaction


@pytest.mark.parametrize(
    "line",
    [
        f"token={HF}",
        f"Authorization: Bearer {OTHER}",
        f"authorization='Token {RAY}'",
        f'"Authorization":"Basic {RAY}"',
        f'{{\\"x-api-key\\": \\"{RAY}\\"}}',
        f"headers: {{b'authorization': b'Bearer {RAY}'}}",
        f"MY_SECRET={RAY}",
        f"export APHRODITE_ADMIN_KEY='{RAY}'",
        f"admin_key: {RAY}",
        f"aws_secret_access_key = {RAY}",
        f"--api-keys\0{RAY}\0",
        f"--hf-token={RAY}",
        f"['--api-keys', '{RAY}']",
        f"https://me:{RAY}@host/x",
        f"/x?token={RAY}&y=1",
        PRIVATE,
        f"api-key: {RAY}",
        f"password: {RAY}",
        f'"password": "{RAY}"',
        f"--api-keys {RAY}",
        f"https://cdn.example/x?X-Amz-Signature={RAY}&X-Amz-Date=20261129T000000Z",
        f"https://cdn.example/x?Policy={RAY}",
        f"X-Amz-Signature={RAY}",
        f"'X-Goog-Signature': '{RAY}'",
        f"https%3A%2F%2Fcdn.example%2Fx%3Fa%3D1%26X-Amz-Signature%3D{RAY}",
        f'"https://cdn.example/x?a=1\\u0026Signature={RAY}"',
        f'<a href="https://cdn.example/x?a=1&amp;sig={RAY}">',
        *(f"clone with {form} there" for form in FORMS),
    ],
)
def test_what_looks_like_a_secret_goes(line: str) -> None:
    cleaned = Redactor.of([]).line(f"before {line} after")
    assert RAY not in cleaned
    assert HF not in cleaned
    assert OTHER not in cleaned
    assert not [form for form in FORMS if form in cleaned]
    assert "b3Blb" not in cleaned
    assert cleaned.startswith("before ")


@pytest.mark.parametrize(
    "line",
    [
        "prompt_tokens=128 completion_tokens: 77, total_tokens",
        "RAY_AUTH_TOKEN_PATH=/tmp/gf/0123/k0/ray-token",
        "RAY_AUTH_MODE=token",
        "tokenizer=/share/model, max_tokens=512, num_kv_tokens: 34000",
        "GET http://127.0.0.1:2242/v1/models",
        "avg generation throughput: 5.2 tokens/s",
        "bearer of bad news",
        "Bearer authentication failed",
        "placing /x/ray-token: Permission denied",
        "k1: /tmp/gf/k1/ray-token: No space left on device",
        "/tmp/gf/0123abcd/k0/api-key: Permission denied",
        "eos_token: <|end_of_text|>, bos_token: <|begin_of_text|>, pad_token='<|finetune_right_pad_id|>'",
        '{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}',
        "the password: incorrect for alice",
        "error: argument --token requires a value",
        "--api-key expected, but none given",
        "usage: serve [--api-key API_KEY [API_KEY ...]] [--token TOKEN] [--hf-token <token>]",
        "the option --api-key cannot be used with --password-file /run/password",
        "authorization: Permission denied",
        "X-Amz-Signature: does not match",
        "python -c 'import hf_hub_download' gf_gpu_memory_utilization",
        "10.77.0.11:6379 -> 203.0.113.9:22",
    ],
)
def test_what_is_none_stays(line: str) -> None:
    assert Redactor.of(["abc"]).line(line) == line  # a secret that is too short is none


JWT = ("eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0NTY3ODkwIn0", "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U")


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        *((f"the answer had {'.'.join(JWT)} in it", part) for part in JWT),
        *((f"run --api-key {word} --port 1", word) for word in ("supersecret", "requirement-of-mine", "Expected!", "Secret")),
        ("aphrodite --admin-key  tulip.fields", "tulip.fields"),
    ],
)
def test_a_secret_without_digits_and_the_end_of_a_token_go_too(line: str, secret: str) -> None:
    assert secret not in Redactor.of([]).line(line)


def test_known_values_go_in_every_form() -> None:
    """Also of a long log and of a long line: a pattern that takes quadratic time on them runs into the test's time-out."""
    secret = "p@ss/word with+signs"
    redactor = Redactor.of([secret])
    basic = base64.b64encode(b":" + secret.encode())
    for form in (secret.encode(), quote(secret, safe="").encode(), base64.b64encode(secret.encode()), basic):
        assert form[:-1] not in redactor.clean(b"x " + form + b" y")
    log = b"2026-11-24 INFO worker.py:12 some-name.with-dots_and=signs: 17 of 20\n" * 60_000
    assert redactor.clean(log) == log
    assert redactor.clean(b"a.b-" * 500_000)
