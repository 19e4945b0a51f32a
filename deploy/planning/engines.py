"""What engines demand and how they split a model, as data; with the sentence for each thing that they refuse."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from deploy.planning import options
from deploy.planning.architectures import ARCHITECTURES, DENSE
from deploy.planning.quantization import least_sm
from deploy.planning.shapes import BYTES, Model
from gracefarm.errors import ConfigError, LayoutError

GivenValue = str | int | float | bool | list[str]


class Engine(BaseModel):
    """An engine at the version that the farm builds (deploy/data/engines.toml)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    command: tuple[str, ...]
    "Program and sub-command; the model's folder follows."
    uneven: bool
    "KV heads and MLP columns need not divide by tp: the first ranks take one more."
    replicas: bool = False
    "It serves several replicas of a model as one."
    native: bool = False
    "It brings several nodes together by itself."
    offload_env: Mapping[str, str] = Field(default_factory=dict)
    "Without these, it ignores weights in host memory."
    replicates: bool
    "More ranks than KV heads are allowed; several hold the same head."
    vocab_multiple: int | None = None
    "The vocabulary is padded to it; None: to tp."
    shared_cache: bool
    "One scheduler for all stages; else the cache is cut into one part per stage."
    default_partition: bool
    "Without the partition variable the last stage takes the remainder; else we do not know and always set it."
    host_variable: str
    partition_variable: str
    port_variable: str | None = None
    "Of the port of torch's store; None: the engine looks for a free one by itself."
    timeout_variable: str
    "Seconds for one step; weights in host memory make steps long."
    key_variable: str
    table: str
    "Of its options, in deploy/data."
    swap_share: float | None = None
    "Share of the head's memory that tp times the swap space may be; None: it does not check."
    env: Mapping[str, str] = Field(default_factory=dict)
    refused: Mapping[str, str]
    "Options that must not be given, and why."


@cache
def _engines() -> dict[str, Engine]:
    table = tomllib.loads((resources.files("deploy") / "data" / "engines.toml").read_text())
    refused = table.pop("refused")
    return {
        name: Engine.model_validate({**entry, "name": name, "refused": {**refused, **entry["refused"]}})
        for name, entry in table.items()
    }


def engine(name: str) -> Engine:
    """By name. Raises ConfigError."""
    if name not in _engines():
        raise ConfigError(f"no engine {name!r}", remedy="there are aphrodite and vllm")
    return _engines()[name]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How each layer is divided over the ranks of a stage."""

    tp: int
    expert_parallel: bool = False
    "Ranks hold whole experts instead of a part of each."
    batched: int = 2048
    "Tokens of one step: what a layer with a window must hold beside it."
    cache_bytes: int = BYTES
    "Of an element of the KV cache."
    expert_multiple: int = 1
    "Columns of MXFP4 experts are padded to it."
    hidden_multiple: int = 1
    "Their hidden size is padded to it."


def mxfp4_padding(sm: int) -> tuple[int, int]:
    """Multiples to which vLLM 0.26.0 pads columns and hidden size of MXFP4 experts, by the kernel that it takes on a GPU.

    Hopper: Triton; Blackwell of data centers: TensorRT-LLM's; others: Marlin (fused_moe/oracle/mxfp4.py).
    """
    return (64, 1) if sm == 90 else (256, 256) if 100 <= sm < 110 else (128, 256)


def refusal(engine_: Engine, model: Model, tp: int, *, expert_parallel: bool = False) -> str | None:
    """Why the engine does not split this model over `tp` GPUs; None: it does."""
    if model.architecture not in ARCHITECTURES or (engine_.uneven and (model.architecture not in DENSE or model.quantization)):
        return f"the planner knows {engine_.name}'s splits of Llama in 16 bit alone, not those of {model.architecture}"
    if engine_.uneven:
        return _uneven(engine_, model, tp)
    rows = vocab(engine_, model, tp)
    for what, number in (
        ("attention heads", model.heads),
        *_columns(model, expert_parallel),
        ("rows of the padded vocabulary", rows),
    ):
        if number % tp:
            return f"tp {tp}: {engine_.name} splits evenly, and {number} {what} do not divide by it"
    if not model.latent and model.kv_heads % tp and tp % model.kv_heads:
        return f"tp {tp}: {engine_.name} splits evenly, and {model.kv_heads} KV heads do not divide by it, nor it by them"
    return _blocks(engine_, model, tp, expert_parallel)


def _uneven(engine_: Engine, model: Model, tp: int) -> str | None:
    if tp <= model.kv_heads:
        return None
    if tp % model.kv_heads:
        return (
            f"tp {tp}: {engine_.name} asserts that tp divides by the {model.kv_heads} KV heads where there are more ranks "
            f"than heads; 1 to {model.kv_heads} work"
        )
    return (
        f"tp {tp}: {engine_.name} gives ranks {model.kv_heads} to {tp - 1} no query heads without quantisation; "
        f"1 to {model.kv_heads} work"
    )


def _columns(model: Model, expert_parallel: bool) -> list[tuple[str, int]]:
    """What is cut by columns: MLPs, experts, shared experts."""
    columns = []
    if model.experts is None or len(model.experts.layers) < model.layers:
        columns.append(("MLP columns", model.mlp))
    if model.experts and not expert_parallel:
        columns.append(("columns of an expert", model.experts.columns))
    if model.experts and model.experts.shared_columns:
        columns.append(("columns of the shared experts", model.experts.shared_columns))
    return columns


def _blocks(engine_: Engine, model: Model, tp: int, expert_parallel: bool) -> str | None:
    """Each rank has whole blocks and groups of weights with a scale (vLLM 0.26.0: fp8_utils.py, fp8.py, marlin_utils.py)."""
    quantization = model.quantization
    if quantization is None or tp == 1:
        return None
    size = (
        quantization.block[0] if quantization.block else quantization.group if quantization.method in ("int", "gptq") else None
    )
    if size is None:
        return None
    attention = [("rows of queries", model.heads * model.head_dim)] if quantization.block and not model.latent else []
    for what, number in (*attention, *_columns(model, expert_parallel)):
        if number // tp % size:
            return (
                f"tp {tp}: {number // tp} {what} on each rank are not divisible by {size}, the block of its "
                f"{quantization.name} weights, and {engine_.name} refuses that"
            )
    return None


def gpu_refusal(engine_: Engine, model: Model, sm: int) -> str | None:
    """Why the engine does not run these weights on a GPU of this compute capability; None: it does."""
    if model.quantization and sm < least_sm(model.quantization):
        least = least_sm(model.quantization)
        return (
            f"{engine_.name} {engine_.version} runs {model.quantization.name} weights from compute capability "
            f"{least // 10}.{least % 10} on, and this GPU has {sm // 10}.{sm % 10}"
        )
    return None


def expert_parallel(engine_: Engine, model: Model, tp: int, forced: bool | None) -> bool:
    """Whether ranks hold whole experts: as deploy.toml says, else where the engine does not cut these experts over `tp`."""
    if forced is not None or model.experts is None:
        return bool(forced and model.experts)
    return bool(refusal(engine_, model, tp)) and not refusal(engine_, model, tp, expert_parallel=True)


def require(engine_: Engine, model: Model, tp: int, *, expert_parallel: bool = False) -> None:
    """Raises LayoutError with the engine's rule, where it refuses `tp`."""
    reason = refusal(engine_, model, tp, expert_parallel=expert_parallel)
    if reason:
        others = ", ".join(map(str, legal(engine_, model)))
        raise LayoutError(reason, remedy=f"the others: tp {others}" if others else 'choose engine = "vllm"')


def legal(engine_: Engine, model: Model, most: int = 64) -> tuple[int, ...]:
    """Every tp up to `most` that the engine takes, cutting experts or not."""
    return tuple(
        tp
        for tp in range(1, most + 1)
        if not all(refusal(engine_, model, tp, expert_parallel=whole) for whole in (False, True))
    )


def part(total: int, rank: int, tp: int, multiple: int = 1) -> tuple[int, int]:
    """Start and size of a rank's share: whole multiples, the first ranks take one more (Aphrodite's parallel_state, 0.6.4)."""
    whole, rest = divmod(total // multiple, tp)
    return (whole * rank + min(rest, rank)) * multiple, (whole + (rank < rest)) * multiple


def kv_heads(engine_: Engine, model: Model, tp: int) -> tuple[int, ...]:
    """KV heads of each rank; where the engine replicates, several ranks have the same one."""
    if engine_.replicates and tp > model.kv_heads:
        return (1,) * tp
    return tuple(part(model.kv_heads, rank, tp)[1] for rank in range(tp))


def vocab(engine_: Engine, model: Model, tp: int) -> int:
    """Rows of the embedding with their padding."""
    multiple = engine_.vocab_multiple or tp
    return -(-model.vocab // multiple) * multiple


def default_partition(layers: int, pp: int) -> tuple[int, ...]:
    """Aphrodite's own split: equal stages, and the last one takes the remainder as well."""
    return (layers // pp,) * (pp - 1) + (layers // pp + layers % pp,)


def check(engine_: Engine, given: Mapping[str, GivenValue], arch: str) -> None:
    """[engine_options] holds nothing that is ours, secret, or known to fail.

    Raises:
        ConfigError: names the option and the reason.
    """
    for key in given:
        name = key.replace("_", "-").lstrip("-")
        option = options.table(engine_.table).find(f"--{name}")
        name = option.name if option else {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size"}.get(name, name)
        if name in engine_.refused:
            raise ConfigError(f"[engine_options] {key}: {engine_.refused[name]}", remedy="remove it from deploy.toml")
    _check_cache(engine_, given, arch)


def _check_cache(engine_: Engine, given: Mapping[str, GivenValue], arch: str) -> None:
    """Aphrodite falls to xformers for these, and there is no xformers for aarch64 in its requirements nor in the farm."""
    if engine_.name != "aphrodite" or arch != "aarch64":
        return
    options_ = {key.replace("_", "-"): value for key, value in given.items()}
    if str(options_.get("kv-cache-dtype", "auto")).startswith("fp8"):
        raise ConfigError(
            "[engine_options] kv-cache-dtype: fp8 needs xformers in this version, which does not exist for aarch64",
            remedy="leave it at auto",
        )
    if int(str(options_.get("block-size", 16))) % 16:
        raise ConfigError(
            "[engine_options] block-size: one that does not divide by 16 needs xformers, which does not exist for aarch64",
            remedy="leave it at 16",
        )


def arguments(engine_: Engine, given: Mapping[str, GivenValue]) -> list[str]:
    """[engine_options] as arguments. Raises ConfigError: an option or value that the engine does not have."""
    words: list[str] = []
    for key, value in given.items():
        words += _argument(engine_, "--" + key.replace("_", "-").lstrip("-"), value)
    return words


def _argument(engine_: Engine, flag: str, value: GivenValue) -> Sequence[str]:
    option = options.table(engine_.table).find(flag)
    if isinstance(value, bool):
        if option and option.action == "boolean":
            return [flag, str(value).lower()]
        if option and option.action == "switch":
            return [flag if value else f"--no-{flag[2:]}"]
        return [flag] if value else []
    if isinstance(value, list):
        if option and option.action == "append":
            return [word for element in value for word in (flag, element)]
        return [flag, *value]
    return [flag, str(value)]


def validate(engine_: Engine, words: Sequence[str]) -> None:
    """Every option of a command line exists in the engine and has an allowed value. Raises ConfigError."""
    options.table(engine_.table).check(words)
