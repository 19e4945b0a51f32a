"""One real model: a small random Llama under `transformers serve` on a node, behind the engine's tunnel and bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.nodes.deployment import load_deployment
from deploy.rehearsal.rig import MOUNT, USER, Rig, open_rig
from tests.deploy import rigkit

pytestmark = [pytest.mark.root, pytest.mark.slow]
TORCH = "torch==2.13.0+cpu"
"Its build without CUDA: the other one is five gigabytes."
MODEL = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {"<s>": 0, "</s>": 1, **{one: rank for rank, one in enumerate(alphabet, 2)}}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
fast.save_pretrained(sys.argv[1])
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )
).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with open_rig(tmp_path_factory.mktemp("rig"), count=2) as made:
        env = made.share / "env"
        uv = [
            sys.executable,
            "-m",
            "uv",
            "venv",
            "--quiet",
            "--relocatable",
            "--no-project",
            "--python",
            "/usr/bin/python3.11",
        ]
        subprocess.run([*uv, str(env)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(env / "bin" / "python"), "install", "--quiet"]
        done = subprocess.run([*pip, TORCH, "transformers[serving]==5.23.0"], capture_output=True, text=True, check=False)
        if f"No matching distribution found for {TORCH}" in done.stderr:
            pytest.skip(f"this machine's Python index has no {TORCH}")
        assert done.returncode == 0, done.stderr
        subprocess.run([str(env / "bin" / "python"), "-c", MODEL, str(made.share / "model")], check=True, capture_output=True)
        for path in (made.share / "model").iterdir():
            path.chmod(0o644)  # only the owner may read written safetensors, and the node has another user
        yield made


def deployment(room: Rig, folder: Path) -> Path:
    """What `deploy init` would leave, for an engine that it did not start."""
    folder.mkdir()
    hosts = ", ".join(f'"{node.address}"' for node in room.nodes)
    text = f'share = "{MOUNT}"\n[nodes]\nhosts = [{hosts}]\nuser = "{USER}"\nkey = "{room.key}"\n'
    (folder / "deploy.toml").write_text(text)
    made = load_deployment(folder / "deploy.toml")
    made.folder.make()
    made.folder.known_hosts.write_text(room.known_hosts.read_text())
    return folder


def deploy(room: Rig, folder: Path, *arguments: str) -> list[str]:
    return room.command(["env", "--chdir", str(folder), sys.executable, "-m", "deploy", *arguments])


def test_a_real_model_behind_tunnel_and_bench(room: Rig, tmp_path: Path) -> None:
    head = room.nodes[0]
    (head.home / "hf" / "hub").mkdir(parents=True)
    program = f"{MOUNT}/env/bin/python {MOUNT}/env/bin/transformers"  # pip's shebang is the path of outside
    serve = f"{program} serve {MOUNT}/model --host 127.0.0.1 --port 2242 --device cpu"
    env = {"HF_HOME": f"/home/{USER}/hf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = f"(chmod -R a+rwX ~/hf 2>/dev/null; setsid {serve} < /dev/null) > /tmp/serve.log 2>&1 &"
    (head.home / "hf").chmod(0o777)
    rigkit.said(rigkit.run(room, command, names=["k0"], env=env))
    folder = deployment(room, tmp_path / "deployment")
    tunnel = subprocess.Popen(
        deploy(room, folder, "tunnel", "--port", "2300", "--json"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert tunnel.stdout
        while '"forwards"' not in (line := tunnel.stdout.readline()):
            assert line, "the tunnel failed"
        url = json.loads(line)["forwards"]["engine"]["url"]
        assert url == "http://127.0.0.1:2300"
        wait(room, f"{url}/health", head.tmp / "serve.log")
        sweep = ("--concurrency", "1,2", "--requests", "4", "--max-tokens", "16", "--json")
        bench = deploy(room, folder, "bench", "--url", f"{url}/v1", "--model", f"{MOUNT}/model", *sweep)
        done = subprocess.run(bench, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + (head.tmp / "serve.log").read_text()[-2000:]
        report = json.loads(done.stdout.splitlines()[-1])
    finally:
        tunnel.terminate()
        tunnel.wait()
        if tunnel.stdout:
            tunnel.stdout.close()
    levels = report["levels"]
    assert [level["concurrency"] for level in levels] == [1, 2]
    for level in levels:
        assert level["answered"] == 4
        assert level["tokens"] == 4 * 16  # counted by the server; a random Llama has no end
        assert level["tokens_per_s"] > 0


def wait(room: Rig, url: str, log: Path, seconds: float = 120) -> None:
    """Until it answers."""
    deadline = time.monotonic() + seconds
    look = room.command([sys.executable, "-c", f"import httpx; httpx.get({url!r}, trust_env=False).raise_for_status()"])
    while subprocess.run(look, capture_output=True, check=False, env={**os.environ}).returncode:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(1)
