"""`deploy init` where no node can be reached, or before a node is asked."""

from __future__ import annotations

from pathlib import Path

from deploy.fleet.results import combined_error
from deploy.rehearsal import hub
from gracefarm.errors import ConfigError, SshError
from tests.deploy.test_init import deploy


def test_before_a_node_was_reached_all_that_is_missing_is_listed_and_serve_names_init(tmp_path: Path) -> None:
    (tmp_path / "ips.txt").write_text("127.0.0.1\n127.0.0.2\n")
    with hub.serving({}, repo="org/gated", gated=True) as served:
        variables = {"HF_ENDPOINT": served.url, "HF_TOKEN": ""}
        done = deploy(tmp_path, "init", "ips.txt", "--port", "9", "--model", "org/gated", **variables)
        text = (tmp_path / "deploy.toml").read_text().replace("vllm", "aphrodite").replace("gh200-cu130", "own-set")
        (tmp_path / "deploy.toml").write_text(text)
        own = deploy(tmp_path, "init", **variables)
    assert (done.returncode, own.returncode) == (60, 60)
    told = [line.split("missing")[1].partition(":")[0].strip() for line in own.stderr.splitlines() if "missing  " in line]
    assert told == ["a shared folder", "a lock of the set own-set", "access to org/gated"]
    assert "k0 127.0.0.1:9 cannot be reached" in done.stderr
    assert "k1 127.0.0.2:9 cannot be reached" in done.stderr
    for command in ("serve", "plan", "facts"):
        asked = deploy(tmp_path, command)
        assert asked.returncode == (60 if command == "facts" else 3)
        assert "run `deploy init`" in asked.stderr
    assert asked.stderr.count("are not stored yet") == 1
    assert "k0 127.0.0.1, k1 127.0.0.2: the host keys of the nodes are not stored yet" in " ".join(asked.stderr.split())


def test_a_shared_folder_has_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "ips.txt").write_text("127.0.0.1\n")
    done = deploy(tmp_path, "init", "ips.txt", "--share", "srv")
    assert done.returncode == 2
    assert "srv is not an absolute path" in done.stderr
    assert not (tmp_path / "deploy.toml").exists()


def test_causes_that_are_equal_are_told_once() -> None:
    same = {name: ConfigError("a.toml: wrong") for name in ("k0", "k1")}
    assert combined_error(same, 2).cause == "a.toml: wrong"
    assert combined_error(same, 3).cause == "2 of 3 nodes failed: a.toml: wrong"
    causes = (
        "k0 10.0.0.1:22 refuses the key",
        "k1 [fd00::2]:22 refuses the key",
        "k2: disk full",
        "k3 10.0.0.4: lost",
        "none",
    )
    mixed = {f"k{number}": SshError(cause) for number, cause in enumerate(causes)}
    assert combined_error(mixed, 5).cause.removeprefix("5 of 5 nodes failed: ") == (
        "k0 10.0.0.1:22, k1 [fd00::2]:22 refuses the key; k2: disk full; k3 10.0.0.4: lost; none"
    )


def test_another_deploy_toml_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ips.txt").write_text("127.0.0.1\n")
    (tmp_path / "deploy.toml").write_text('[nodes]\nhosts = ["127.0.0.9"]\n')
    done = deploy(tmp_path, "init", "ips.txt", "--accept")
    assert done.returncode == 3
    assert "already exists" in done.stderr
    assert "127.0.0.9" in (tmp_path / "deploy.toml").read_text()
