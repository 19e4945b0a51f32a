"""What a person may give that is wrong: one sentence, one remedy and a code of docs/reference/errors.md, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli.common import DeployContext
from deploy.cli.work import at_work, held
from deploy.nodes.deployment import load_deployment
from deploy.planning import hardware, suppose
from deploy.steps import setlock
from deploy.steps.step import Work
from gracefarm.console import Console
from gracefarm.errors import ConfigError, EngineError
from tests.deploy.test_init import deploy

TOML = '[[node]]\naddress = "127.0.0.1"\nport = 9\n'
SHAPE = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awk"}}


def told(folder: Path, code: int, words: str, *arguments: str) -> None:
    done = deploy(folder, *arguments)
    assert "Traceback" not in done.stderr
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "remedy:" in done.stderr


def prepared(folder: Path, text: str = TOML) -> None:
    """deploy.toml, and its folder as `deploy init` leaves it."""
    (folder / "deploy.toml").write_text(text)
    (folder / ".deploy" / "logs").mkdir(parents=True, mode=0o700)
    (folder / ".deploy" / "id").write_text("ab" * 6 + "\n")


@pytest.mark.parametrize("more", [(), ("--jump", "127.0.0.1:9")])
def test_a_key_that_is_none(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "ips.txt").write_text("127.0.0.1\n")
    (tmp_path / "notakey").write_text("this is not a key\n")
    words = "notakey: Invalid private key" if not more else "jump host"
    told(tmp_path, 60, words, "init", "ips.txt", "--port", "9", "--key", "notakey", *more)


def test_a_configuration_of_ssh_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "home" / ".ssh" / "config").write_text("Host *\n  Port twenty-two\n")
    (tmp_path / "ips.txt").write_text("127.0.0.1\n")
    told(tmp_path, 60, "config line 2", "init", "ips.txt")


@pytest.mark.parametrize("jump", ["host:99999", "host:x", "-oProxyCommand=x", "a b", "user@"])
def test_a_jump_host_that_is_none(tmp_path: Path, jump: str) -> None:
    (tmp_path / "ips.txt").write_text("127.0.0.1\n")
    told(tmp_path, 2, "jump host", "init", "ips.txt", f"--jump={jump}")
    assert not (tmp_path / "deploy.toml").exists()
    (tmp_path / "deploy.toml").write_text(TOML + f'jump = "{jump}"\n')
    told(tmp_path, 3, "deploy.toml:4: key 'node.0.jump'", "init", "deploy.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "contains a list instead of a JSON object"),
        (json.dumps(SHAPE), "the quantisation awk"),
        ('{"architectures": 7}', "config.json names no architecture"),
        ('{"a":' * 100_000, "its JSON is nested too deeply"),
        ("no", "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_config_json_of_another_kind(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    prepared(tmp_path, TOML + '[model]\nrepo = "a/b"\nconfig = "config.json"\n')
    told(tmp_path, 3 if "JSON" in words else 64, words, "plan", "--nodes", "10")


@pytest.mark.parametrize("background", [(), ("--background",)])
def test_a_tunnel_of_a_deployment_that_is_not_prepared(tmp_path: Path, background: tuple[str, ...]) -> None:
    (tmp_path / "deploy.toml").write_text(TOML)
    told(tmp_path, 3, "is not initialised", "tunnel", *background)
    assert not (tmp_path / ".deploy").exists()


@pytest.mark.parametrize("url", ["http://[::1", "127.0.0.1:8000", "ftp://there", "http://"])
def test_an_address_to_bench_that_is_none(tmp_path: Path, url: str) -> None:
    told(tmp_path, 2, "--url", "bench", "--url", url)
    told(tmp_path, 2, "--url", "ask", "why?", "--url", url)


def test_a_lock_that_is_no_text(tmp_path: Path) -> None:
    prepared(tmp_path, 'lock = "x.lock"\n' + TOML)
    (tmp_path / "x.lock").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="the lock cannot be read"):
        setlock.lock_text(load_deployment(tmp_path / "deploy.toml"), Console())


@pytest.mark.parametrize("index", ["https://me:geheim7@host/simple/", "https://geheim7@host/simple/"])
def test_an_index_with_a_password_is_refused_and_the_password_not_shown(tmp_path: Path, index: str) -> None:
    (tmp_path / "deploy.toml").write_text(f'index = "{index}"\n' + TOML)
    told(tmp_path, 3, "deploy.toml:1: key 'index'", "plan")
    assert "geheim7" not in deploy(tmp_path, "plan").stderr
    (tmp_path / "deploy.toml").write_text('index = "https://host:8080/@set/simple/"\n' + TOML)
    told(tmp_path, 3, "were not collected yet", "plan")


def test_no_line_of_another_programs_log_brings_a_secret_onto_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path)
    deployment = load_deployment(tmp_path / "deploy.toml")
    deployment.folder.api_key.write_text("the-engines-own-key\n")
    supposed = suppose.suppose(hardware.named("gh200-96"), 1, deployment)[1]
    deployment.folder.facts.write_text(supposed.model_dump_json())
    said = "Namespace(api_keys='the-engines-own-key', token='hf_" + "AbCd" * 8 + "')"

    async def fails(work: Work) -> None:
        work.console.warn(f"once more: {said}")
        work.console.step("engine", said)
        work.console.event("line", said)
        raise EngineError(f"the engine ended: {said}", remedy=f"look: {said}")

    context = DeployContext(file=deployment.path, console=Console())
    with held(context) as keeper, pytest.raises(EngineError) as error:
        at_work(context, keeper, fails)
    shown = capsys.readouterr().err + error.value.cause + error.value.remedy
    assert shown.count("Namespace") == 5
    assert "the-engines-own-key" not in shown
    assert "AbCd" not in shown
