"""The stand-in for the engine on real Ray: as strict, as blind and as mortal as the original."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.rehearsal import standin
from deploy.rehearsal.rig import MOUNT, Rig, open_rig
from tests.deploy import nodefaults, rigkit
from tests.deploy.rigkit import Engine

SOURCE = Path(standin.__file__).parent.parent / "data" / "rehearsal" / "standin"
KEY = "sk-rehearsal-secret"
MODEL = f"{MOUNT}/model"
PARTITION = "2,1,3"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with open_rig(tmp_path_factory.mktemp("rig"), count=3) as made:
        rigkit.install(made.share / "env")
        rigkit.small_model(made.share / "model")
        yield made


def aphrodite(room: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed console script, without Ray, which it does not need in order to refuse."""
    program = room.share / "env" / "bin" / "aphrodite"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--no-such-option"], 2, "unrecognized arguments: --no-such-option"),
        (["--dtype", "bf15"], 2, "invalid choice: 'bf15'"),
        (["--tensor-parallel-size", "many"], 2, "invalid int value"),
        (["--tensor_parallel_size", "3", "-q", "awq"], 1, "(16) must be divisible by tensor parallel size (3)"),
        (["--max-parallel-loading-workers", "2"], 1, "NotImplementedError"),
        (["--enforce-eager", "maybe"], 2, "Expected 'true' or 'false'"),
    ],
)
def test_refuses_what_the_engine_refuses(room: Rig, arguments: list[str], code: int, words: str) -> None:
    done = aphrodite(room, "run", str(room.share / "model"), *arguments)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


@pytest.mark.root
def test_needs_a_model_and_says_what_it_is(room: Rig, tmp_path: Path) -> None:
    done = aphrodite(room, "run", str(tmp_path))
    assert "does not appear to have a file named config.json" in done.stderr
    assert done.stdout.startswith("INFO:     STAND-IN for aphrodite-engine 0.6.4.post1")


LLAMA_405B = {
    "num_hidden_layers": 126,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def held(tmp_path: Path, rank: int, tp: int, pp: int, partition: str | None = None) -> str:
    """Weights of a rank of Llama 405B in GiB by the stand-in's sources, or how they refuse."""
    model = tmp_path / "model"
    if not model.exists():
        rigkit.small_model(model, **LLAMA_405B)
    code = (
        "import sys, pathlib; from aphrodite import shape\n"
        "model = shape.read(pathlib.Path(sys.argv[1])); found = shape.held(model, *map(int, sys.argv[2:]))\n"
        "print(f'{(found.offloadable + found.fixed) / shape.GIB:.1f}')"
    )
    env = {"PYTHONPATH": str(SOURCE), **({"APHRODITE_PP_LAYER_PARTITION": partition} if partition else {})}
    argv = [sys.executable, "-c", code, str(model), str(rank), str(tp), str(pp)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_splits_llama_405b_as_the_engine_does(tmp_path: Path) -> None:
    assert [held(tmp_path, rank, 5, 2) for rank in (0, 2, 3, 9)] == ["78.9", "78.9", "70.6", "70.6"]
    assert held(tmp_path, 9, 1, 10) == "110.8"  # the last stage has the remainder
    assert held(tmp_path, 9, 1, 10, "12,13,13,13,13,13,13,12,12,12") == "75.2"
    assert held(tmp_path, 0, 1, 10, "12,12") == "ValueError: len(partitions)=2 does not match pp_size=10."
    for tp in (9, 15):
        assert held(tmp_path, 0, tp, 1) == f"AssertionError: {tp} is not divisible by 8"


def test_same_sources_same_wheel_and_it_says_stand_in(tmp_path: Path) -> None:
    one, two = standin.build(tmp_path / "a"), standin.build(tmp_path / "b")
    assert (one.path.name, one.sha256) == (two.path.name, two.sha256)
    assert "STAND-IN" in standin.METADATA
    code = "import sys; sys.path.insert(0, sys.argv[1]); import aphrodite; print(aphrodite.ABOUT)"
    done = subprocess.run([sys.executable, "-c", code, str(one.path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("STAND-IN")


# on Ray


@pytest.fixture(scope="module")
def address(room: Rig) -> Iterator[str]:
    """Ray on three nodes; k2's has the variable that must be in its `ray start`, and so have the others."""
    env = {"APHRODITE_PP_LAYER_PARTITION": PARTITION, "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    with rigkit.ray_cluster(room, dict.fromkeys(("k0", "k1", "k2"), env)) as where:
        yield where


@contextmanager
def engine(room: Rig, address: str, *arguments: str, model: str = MODEL, **env: str) -> Iterator[Engine]:
    words = [model, "--host", "127.0.0.1", "--max-model-len", "2048", "--served-model-name", "tiny", *arguments]
    made = Engine(room, address, words, {"APHRODITE_API_KEY": KEY, **env})
    try:
        yield made
    finally:
        for pid in made.pids():
            nodefaults.kill(made.node, pid)


def order(room: Rig, name: str, text: str) -> None:
    """A fault for one node."""
    (room[name].home / ".gracefarm-standin").write_text(text)


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "room" in request.fixturenames:
        for node in request.getfixturevalue("room").nodes:
            (node.home / ".gracefarm-standin").unlink(missing_ok=True)


@pytest.mark.root
@pytest.mark.slow
def test_serves_with_the_environment_of_its_workers(room: Rig, address: str) -> None:
    order(room, "k2", "load=slow:3")
    with engine(room, address, "-pp", "3", APHRODITE_PP_LAYER_PARTITION=PARTITION, ONLY_THE_DRIVER="1") as made:
        made.wait("Loading model")
        with pytest.raises(ConnectionError, match="refused"):  # while it loads, no process listens
            made.get("/health")
        made.wait("Uvicorn running")
        report = made.get("/standin/report").json()
        assert [(rank["rank"], rank["ip"]) for rank in report["ranks"]] == [(k, f"10.77.0.{11 + k}") for k in range(3)]
        for rank in report["ranks"]:
            assert rank["env"]["HOST_IP"] == rank["ip"]
            assert rank["env"]["APHRODITE_PP_LAYER_PARTITION"] == PARTITION
            assert rank["env"]["CUDA_VISIBLE_DEVICES"] == "0"
        drivers, *workers = [set(rank["names"]) for rank in report["ranks"]]
        assert {"APHRODITE_API_KEY", "ONLY_THE_DRIVER"} <= drivers
        assert all(not {"APHRODITE_API_KEY", "ONLY_THE_DRIVER"} & each for each in workers)
        assert KEY not in made.text()

        assert made.get("/v1/models").status_code == 401
        assert made.get("/v1/models", key="other").status_code == 401
        assert [made.get(path).status_code for path in ("/health", "/version", "/metrics")] == [200, 200, 200]
        assert made.get("/v1/models", key=KEY).json()["data"][0]["id"] == "tiny"
        assert made.post("/v1/completions", {"model": "other", "prompt": "x"}, key=KEY).status_code == 404

        body: dict[str, object] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 37}
        streamed = made.post(
            "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}, key=KEY
        ).text
        lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 37
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
        assert 10 < len([text for text in texts if text]) < 20  # a chunk is not a token
        whole = made.post("/v1/chat/completions", body, key=KEY).json()
        assert whole["choices"][0]["message"]["content"] == "".join(texts)
        assert 'aphrodite:generation_tokens_total{model_name="tiny"} 74.0' in made.get("/metrics").text

        pid = report["ranks"][1]["pid"]
        nodefaults.kill(room["k1"], pid)
        time.sleep(1)
        assert made.get("/health").status_code == 200  # with a dead worker
        assert made.post("/v1/completions", {"model": "tiny", "prompt": "x"}, key=KEY).status_code == 500
        assert "already dead, terminating" in made.wait("\nended ", 30)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "model", "env", "words"),
    [
        (("-tp", "4"), MODEL, {}, "The number of required GPUs exceeds the total number of available GPUs"),
        (("-tp", "3"), MODEL, {}, "len(partitions)=3 does not match pp_size=1."),
        (("-tp", "3"), MODEL, {"HOST_IP": "10.77.0.99"}, "Ray does not allocate any GPUs on the driver node"),
        (("-tp", "3"), f"{MOUNT}/nothing", {}, "does not appear to have a file named config.json"),
    ],
)
def test_refuses_a_cluster_that_does_not_fit(
    room: Rig, address: str, arguments: tuple[str, ...], model: str, env: dict[str, str], words: str
) -> None:
    with engine(room, address, *arguments, model=model, **env) as made:
        text = made.wait("\nended ", 60)
    assert words in text
    assert text.endswith("ended 1\n")
    assert "Uvicorn running" not in text


@pytest.mark.root
@pytest.mark.slow
def test_a_stage_list_that_reached_the_driver_alone_is_not_the_workers(room: Rig, address: str) -> None:
    """Finding 4: Ray's workers have the environment of their `ray start`."""
    with engine(room, address, "-pp", "3", APHRODITE_PP_LAYER_PARTITION="2,2,2") as made:
        made.wait("Uvicorn running")
        ranks = made.get("/standin/report").json()["ranks"]
    assert [rank["env"]["APHRODITE_PP_LAYER_PARTITION"] for rank in ranks] == ["2,2,2", PARTITION, PARTITION]


@pytest.mark.root
@pytest.mark.slow
def test_shards_matter(room: Rig, address: str) -> None:
    shards = sorted((room.share / "model").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    try:
        shards[1].write_bytes(whole[:-1] + b"X")  # the engine cannot know; its answers tell
        with engine(room, address, "-pp", "3") as made:
            made.wait("Uvicorn running")
            answer = made.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 4}, key=KEY)
            assert answer.json()["choices"][0]["text"] == "!!!!"
        shards[1].write_bytes(whole[:-1])
        with engine(room, address, "-pp", "3") as made:
            assert "MetadataIncompleteBuffer" in made.wait("\nended ", 60)
        shards[1].unlink()
        with engine(room, address, "-pp", "3") as made:
            assert f"No such file or directory: '{MODEL}/{shards[1].name}'" in made.wait("\nended ", 60)
    finally:
        shards[1].write_bytes(whole)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "fault", "words"),
    [
        ("k1", "init=die", "died unexpectedly"),
        ("k1", "load=die", "died unexpectedly"),
        ("k2", "loaded=die", "died unexpectedly"),
        ("k2", "load=oom", "CUDA out of memory. Tried to allocate"),
        ("k0", "load=oom", "torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_dies_while_it_loads(room: Rig, address: str, node: str, fault: str, words: str) -> None:
    order(room, node, fault)
    with engine(room, address, "-pp", "3") as made:
        text = made.wait("\nended ", 90)
    assert words in text
    assert text.endswith("ended 1\n")


@pytest.mark.root
@pytest.mark.slow
def test_wedged_is_healthy_until_the_iteration_times_out(room: Rig, address: str) -> None:
    with engine(room, address, "-pp", "3", APHRODITE_ENGINE_ITERATION_TIMEOUT_S="3") as made:
        made.wait("Uvicorn running")
        order(room, "k2", "step=wedge")
        started = time.monotonic()
        assert made.post("/v1/completions", {"model": "tiny", "prompt": "x"}, key=KEY).status_code == 500
        assert 2.5 < time.monotonic() - started < 15
        text = made.wait("\nended ", 30)
    assert "Engine iteration timed out." in text
    assert text.endswith("ended 0\n")


@pytest.mark.root
@pytest.mark.slow
def test_a_taken_port_is_found_out_after_the_load(room: Rig, address: str) -> None:
    pid = nodefaults.take_port(room["k0"], 2242)
    try:
        with engine(room, address, "-pp", "3") as made:
            text = made.wait("\nended ", 90)
    finally:
        nodefaults.kill(room["k0"], pid)
    assert "address already in use" in " ".join(text.split())
    assert "Model weights loaded" in text
    assert text.endswith("ended 1\n")
