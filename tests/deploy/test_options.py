"""The table of the engine's options: what it refuses, and that it is what the wheel on PyPI has."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from deploy import options
from gracefarm.errors import ConfigError

NAME = "aphrodite-0.6.4.post1"


def test_real_command_lines_pass() -> None:
    table = options.table(NAME)
    table.check(["--host", "127.0.0.1", "--tensor_parallel-size", "5", "-pp", "2", "--enforce-eager", "--uvloop"])
    table.check(
        ["--served-model-name", "a", "b", "--cpu-offload-gb=3.5", "--enable-chunked-prefill", "true", "--rope-theta", "-1"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor-parallel", "5"], "has no option --tensor-parallel"),
        (["--port", "x"], "not an integer"),
        (["--port"], "needs a value"),
        (["--uvloop", "yes"], "has no option yes"),
        (["--uvloop=yes"], "takes no value"),
        (["--kv-cache-dtype", "fp9"], "none of its values"),
        (["--block-size", "24"], "none of its values"),
        (["--enable-chunked-prefill", "yes"], "not true or false"),
        (["--rope-scaling", "{"], "not JSON"),
        (["--limit-mm-per-prompt", "image=x"], "not KEY=INTEGER"),
    ],
)
def test_what_the_engine_would_refuse_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options.table(NAME).check(arguments)


def test_the_table_knows_what_the_plan_rests_on() -> None:
    table = options.table(NAME)
    defaults = {one.name: one.default for one in table.options}
    assert (defaults["gpu-memory-utilization"], defaults["swap-space"], defaults["max-num-seqs"]) == (0.9, 4, 256)
    assert defaults["enable-chunked-prefill"] is False
    assert "transformers==4.45.2" in table.requires
    assert len(table.options) == len({flag for one in table.options for flag in one.flags if flag.startswith("--")}) - 1 == 108


@pytest.mark.slow
def test_the_committed_table_is_what_the_wheel_has(tmp_path: Path) -> None:
    """200 MB from the Python index; pinned, so it is the same wheel for ever."""
    table = options.table(NAME)
    lock = tmp_path / "lock"
    lock.write_text(f"{table.distribution}=={table.version} --hash=sha256:{table.sha256}\n")
    arguments = ["--no-deps", "--only-binary", ":all:", "--platform", "manylinux1_x86_64", "--python-version", "3.8"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *arguments, "--require-hashes", "-r", str(lock)]
    subprocess.run([*command, "--dest", str(tmp_path)], check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    committed = (resources.files("deploy") / "data" / f"{NAME}-options.json").read_text()
    assert options.render(options.read_wheel(wheel)) == committed
