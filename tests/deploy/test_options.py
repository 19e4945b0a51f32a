"""The table of the engine's options: what it refuses, and that it is what the wheel on PyPI has."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any, Optional

import pytest

from deploy.planning import engines, models, options, shards
from deploy.planning.engines import Split
from deploy.planning.shapes import Model
from deploy.steps import environment
from gracefarm.errors import ConfigError
from tests.conftest import REPOSITORY
from tools import engine_options

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
        (["--port"], "requires a value"),
        (["--uvloop", "yes"], "has no option yes"),
        (["--uvloop=yes"], "does not accept a value"),
        (["--kv-cache-dtype", "fp9"], "the value is not allowed"),
        (["--block-size", "24"], "the value is not allowed"),
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
    defaults = {option.name: option.default for option in table.options}
    assert (defaults["gpu-memory-utilization"], defaults["swap-space"], defaults["max-num-seqs"]) == (0.9, 4, 256)
    assert defaults["enable-chunked-prefill"] is False
    assert "transformers==4.45.2" in table.requires
    assert (
        len(table.options)
        == len({flag for option in table.options for flag in option.flags if flag.startswith("--")}) - 1
        == 108
    )


VLLM = "vllm-0.26.0"
VLLM_SETS = {VLLM: "gh200-cu130", "vllm-0.33.0": "gh200-cu130-torch2.14"}
"A table to the set that has its wheel."


@pytest.mark.parametrize("name", VLLM_SETS)
def test_real_command_lines_of_vllm_pass(name: str) -> None:
    options.table(name).check(
        [
            *("--tensor-parallel-size", "4", "-pp", "2", "--enable-chunked-prefill", "--no-enable-prefix-caching"),
            *("--max_model_len", "8k", "--seed", "1", "--cpu-offload-gb", "3.5", "--distributed-executor-backend", "ray"),
            *("--compilation-config", '{"level": 3}', "--compilation-config.level", "3", "--hf-overrides.rope_theta", "1"),
            *("--max-log-len", "None", "--served-model-name", "a", "b", "--allowed-origins", '["*"]', "--quantization", "fp8"),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--swap-space", "4"], "vllm 0.26.0 has no option --swap-space"),
        (["--engine-use-ray"], "has no option"),
        (["--enforce-eager", "true"], "has no option true"),
        (["--no-seed"], "has no option --no-seed"),
        (["--seed.a", "1"], "has no option --seed.a"),
        (["--port", "x"], "not an integer"),
        (["--max-num-seqs", "None"], "not an integer"),
        (["--kv-cache-dtype", "fp9"], "the value is not allowed"),
        (["--disable-expert-parallel"], "has no option"),
        (["--override-generation-config", "{"], "not JSON"),
        (["--seed"], "requires a value"),
    ],
)
def test_what_vllm_would_refuse_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options.table(VLLM).check(arguments)


def test_a_switch_of_the_newer_vllm_has_an_opposite_and_its_old_spelling() -> None:
    table = options.table("vllm-0.33.0")
    table.check(["--disable-prefix-caching", "--no-enable-prefix-caching", "--enable-custom-all-reduce"])
    assert table.find("--disable-expert-parallel") is table.find("--enable-expert-parallel")
    assert table.find("--device-memory-utilization") is table.find("--gpu-memory-utilization")


def test_choices_of_the_newer_vllm_are_known_unless_they_are_computed() -> None:
    table = options.table("vllm-0.33.0")
    with pytest.raises(ConfigError) as error:
        table.check(["--log-level", "loud"])
    assert "use one of CRITICAL" in error.value.remedy
    table.check(["--mm-processor-device", "cuda", "--max-num-queued-tokens", "8k"])  # the device is that of the platform


@pytest.mark.parametrize(("name", "count"), [(VLLM, 269), ("vllm-0.33.0", 356)])
def test_all_options_of_vllms_engine_are_in_its_table(name: str, count: int) -> None:
    """Where vllm itself ran (docs/reference/sets.md), argparse had 270 and 322 long names, --help among them. Only vllm's own
    parser adds the 35 opposites of 0.33.0, --disable-x and --enable-x."""
    made = options.table(name).options
    at = next(index for index, option in enumerate(made) if option.name == "model")
    names = [flag for option in made[at:] for flag in option.flags if flag.startswith("--")]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize(
    ("engine", "absent"),
    [
        (engines.engine("aphrodite"), ["config"]),
        *((engines.engine("vllm", version), []) for version in engines.versions("vllm")),
    ],
)
def test_every_option_that_is_refused_is_one_of_the_engine(engine: engines.Engine, absent: list[str]) -> None:
    table = options.table(engine.table)
    assert [name for name in engine.refused if table.find(f"--{name}") is None] == absent


@pytest.mark.parametrize(("name", "set_"), VLLM_SETS.items())
def test_vllms_table_is_of_the_wheel_that_its_set_has(name: str, set_: str) -> None:
    lock = (REPOSITORY / "sets" / set_ / "requirements.lock").read_text()
    table = options.table(name)
    assert f"vllm=={table.version} --hash=sha256:{table.sha256}" in lock
    assert f"# {table.wheel}\n" in lock


@pytest.fixture(scope="module", params=VLLM_SETS)
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB from the Python index: the wheel of a set."""
    return fetched(request.param, "manylinux_2_28_aarch64", "3.11", tmp_path_factory.mktemp("vllm"))


@pytest.mark.slow
def test_vllms_committed_table_is_what_the_wheel_has(vllm: Path) -> None:
    made = engine_options.read_wheel(vllm)
    committed = (resources.files("deploy") / "data" / f"vllm-{made.version}-options.json").read_text()
    assert engine_options.render(made) == committed


def engine_of(vllm: Path) -> engines.Engine:
    return engines.engine("vllm", engine_options.read_wheel(vllm).version)


@pytest.mark.slow
def test_vllms_wheel_has_the_modules_and_variables_that_deploy_names(vllm: Path) -> None:
    with zipfile.ZipFile(vllm) as opened:
        members = opened.namelist()
        text = "\n".join(opened.read(name).decode() for name in ("vllm/envs.py", "vllm/distributed/utils.py"))
        padding = opened.read("vllm/model_executor/layers/vocab_parallel_embedding.py").decode()
    wanted = [row.module for row in environment.matrix("vllm").modules if row.module.startswith("vllm.")]
    assert len(wanted) == 2
    for module in wanted:
        assert any(member.startswith(module.replace(".", "/") + ".") for member in members), module
    one = engine_of(vllm)
    names = (one.host_variable, one.partition_variable, one.port_variable, one.timeout_variable, one.key_variable)
    for name in (*filter(None, names), *one.offload_env, "VLLM_RAY_DP_PACK_STRATEGY"):
        assert f'"{name}"' in text, name
    assert f"DEFAULT_VOCAB_PADDING_SIZE = {one.vocab_multiple}\n" in padding


@pytest.mark.slow
def test_vllms_wheel_offloads_weights_with_the_environment_of_the_plan(vllm: Path) -> None:
    """A model runner that calls no set_offloader ignores --cpu-offload-gb."""
    with zipfile.ZipFile(vllm) as opened:
        first, second = (
            "set_offloader(create_offloader(" in opened.read(f"vllm/v1/worker/{name}.py").decode()
            for name in ("gpu_model_runner", "gpu/model_runner")
        )
    assert first
    assert second is (engine_of(vllm).offload_env == {})


@pytest.mark.slow
def test_vllms_wheel_has_the_metrics_the_paths_and_the_measurement_that_deploy_uses(vllm: Path) -> None:
    with zipfile.ZipFile(vllm) as opened:

        def text(*folders: str) -> str:
            names = [name for name in opened.namelist() if name.startswith(folders) and name.endswith(".py")]
            return "\n".join(opened.read(name).decode() for name in names)

        metrics_, server, bench = text("vllm/v1/metrics/"), text("vllm/entrypoints/"), text("vllm/benchmarks/")
        log = text("vllm/v1/core/", "vllm/v1/worker/", "vllm/model_executor/model_loader/")
    of_metrics = ("generation_tokens", "prompt_tokens", "num_requests_running", "num_requests_waiting", "num_preemptions")
    for name in (*of_metrics, "kv_cache_usage_perc", "time_to_first_token_seconds"):
        assert f'"vllm:{name}"' in metrics_, name
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"):
        assert f'"{path}"' in server, path
    for line in ("Loading safetensors checkpoint", "Model loading took", "KV cache size: %s tokens", "Capturing CUDA graph"):
        assert line in log, line
    for option in OPTIONS_OF_BENCH:
        assert f'"--{option}"' in bench, option
    for key in ("completed", "duration", "total_input_tokens", "total_output_tokens", "output_throughput"):
        assert f'"{key}"' in bench, key
    assert "p{p_word}_{metric_attribute_name}_ms" in bench
    assert 'environ.get("OPENAI_API_KEY")' in bench


OPTIONS_OF_BENCH = (
    *("backend", "endpoint", "base-url", "model", "tokenizer", "tokenizer-mode", "trust-remote-code", "dataset-name", "seed"),
    *("random-input-len", "random-output-len", "num-prompts", "max-concurrency", "ignore-eos", "temperature"),
    *("percentile-metrics", "metric-percentiles", "save-result", "disable-tqdm", "result-dir", "result-filename"),
)
"What deploy/measure/vllm_bench.py gives."


def fetched(name: str, platform: str, python: str, folder: Path) -> Path:
    """The wheel of a table, by its sha256."""
    table, lock = options.table(name), folder / "lock"
    lock.write_text(f"{table.distribution}=={table.version} --hash=sha256:{table.sha256}\n")
    arguments = ["--no-deps", "--only-binary", ":all:", "--platform", platform, "--python-version", python]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *arguments, "--require-hashes", "-r", str(lock)]
    subprocess.run([*command, "--dest", str(folder)], check=True, timeout=500)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB from the Python index; pinned, so it is always the same wheel."""
    return fetched(NAME, "manylinux1_x86_64", "3.8", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_committed_table_is_what_the_wheel_has(wheel: Path) -> None:
    committed = (resources.files("deploy") / "data" / f"{NAME}-options.json").read_text()
    assert engine_options.render(engine_options.read_wheel(wheel)) == committed


def function(wheel: Path, member: str, name: str, **names: object) -> Any:
    """One function of the wheel, without its module, which needs torch and a GPU."""
    with zipfile.ZipFile(wheel) as opened:
        text = opened.read(member).decode()
    (node,) = [
        statement for statement in ast.parse(text).body if isinstance(statement, ast.FunctionDef) and statement.name == name
    ]
    space: dict[str, Any] = {"Optional": Optional, "Tuple": tuple, **names}
    exec(compile(ast.Module(body=[node], type_ignores=[]), member, "exec"), space)
    return space[name]


@pytest.mark.slow
def test_the_engines_own_functions_split_as_we_do(wheel: Path) -> None:
    state, utils = "aphrodite/distributed/parallel_state.py", "aphrodite/distributed/utils.py"
    size = function(wheel, state, "get_current_tp_rank_partition_size")
    offset = function(wheel, state, "get_current_tp_rank_partition_offset")
    for total, multiple in ((8, 1), (53248, 1), (16384, 2048), (28672, 1), (7, 1), (12, 4)):
        for tp in range(1, 9):
            theirs = [(offset(total, rank, tp, multiple), size(total, rank, tp, multiple)) for rank in range(tp)]
            assert theirs == [engines.part(total, rank, tp, multiple) for rank in range(tp)]
    for layers in (126, 80, 32, 7):
        for pp in range(1, min(layers, 16) + 1):
            stages = function(wheel, utils, "get_pp_indices", APHRODITE_PP_LAYER_PARTITION=None)
            own = [stages(layers, rank, pp) for rank in range(pp)]
            assert tuple(end - start for start, end in own) == engines.default_partition(layers, pp)
            ours = shards.balance(engines.engine("aphrodite"), llama(layers), Split(tp=1), pp)
            stages = function(wheel, utils, "get_pp_indices", APHRODITE_PP_LAYER_PARTITION=",".join(map(str, ours)))
            assert tuple(stages(layers, rank, pp)[1] - stages(layers, rank, pp)[0] for rank in range(pp)) == ours


def llama(layers: int) -> Model:
    found = models.built_in("meta-llama/Llama-3.1-405B", "main")
    assert found
    return found.model_copy(update={"layers": layers})


@pytest.mark.slow
def test_the_engine_reads_the_variables_that_the_plan_sets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        text = "\n".join(opened.read(name).decode() for name in opened.namelist() if name.endswith(".py"))
    engine = engines.engine("aphrodite")
    variables = (engine.host_variable, engine.partition_variable, engine.port_variable or "", engine.timeout_variable)
    named = (*variables, engine.key_variable, *engine.env)
    for name in named:
        assert f'"{name}"' in text or f"'{name}'" in text, name
