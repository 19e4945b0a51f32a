"""Requirements of engines, how they split a model, and the error for each split that they refuse."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field

from deploy.nodes import setlock
from deploy.nodes.deployment import Deployment
from deploy.planning import options
from deploy.planning.architectures import ARCHITECTURES, DENSE
from deploy.planning.quantization import least_sm
from deploy.planning.shapes import BYTES, Model
from gracefarm.errors import ConfigError, LayoutError

GivenValue = str | int | float | bool | list[str]


class Engine(BaseModel):
    """An engine in a version that a set has (deploy/data/engines.toml)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    command: tuple[str, ...]
    "Program and subcommand. The model's folder is the next argument."
    uneven: bool
    "KV heads and MLP columns need not be divisible by tp: the first ranks get one more."
    replicas: bool = False
    "It can serve several replicas of a model."
    native: bool = False
    "It can connect several nodes without Ray."
    offload_env: Mapping[str, str] = Field(default_factory=dict)
    "Environment without which it ignores offloaded weights."
    replicates: bool
    "There may be more ranks than KV heads: several ranks have the same head."
    vocab_multiple: int | None = None
    "The vocabulary is padded to a multiple of this; None: of tp."
    shared_cache: bool
    "One scheduler for all stages; else each stage has an equal part of the cache."
    default_partition: bool
    "Without the partition variable, the last stage gets the remainder. If false, the plan always sets the variable."
    host_variable: str
    partition_variable: str
    port_variable: str | None = None
    "Variable for the port of torch's store; None: the engine selects a free port."
    timeout_variable: str
    "Variable for the timeout of a step in seconds. Offloaded weights make steps long."
    key_variable: str
    note: str = ""
    "A note in each of its plans."
    swap_share: float | None = None
    "The engine checks that tp times the swap space is at most this share of the head's memory; None: no check."
    env: Mapping[str, str] = Field(default_factory=dict)
    refused: Mapping[str, str]
    "Options that deploy.toml must not set, with the reason."

    @property
    def table(self) -> str:
        """Name of the table of its options in deploy/data."""
        return f"{self.name}-{self.version}"


@cache
def _engines() -> dict[str, tuple[Engine, ...]]:
    """The versions of each engine. The first is the default."""
    table = tomllib.loads((resources.files("deploy") / "data" / "engines.toml").read_text())
    refused = table.pop("refused")
    return {name: tuple(_versions(name, entry, refused)) for name, entry in table.items()}


def _versions(name: str, entry: Mapping[str, Any], refused: Mapping[str, str]) -> Iterator[Engine]:
    """The engine, then its other versions, which have the same values if their table does not change them."""
    base = {**entry, "name": name, "refused": {**refused, **entry["refused"]}}
    others = base.pop("versions", {})
    yield Engine.model_validate(base)
    for version, changes in others.items():
        yield Engine.model_validate({**base, **changes, "version": version})


def engine(name: str, version: str | None = None) -> Engine:
    """Find an engine by name, in the newest known version up to `version`, else in the oldest. None: the default version.

    Raises:
        ConfigError: there is no engine of this name.
    """
    if name not in _engines():
        raise ConfigError(f"unknown engine {name!r}", remedy="use aphrodite or vllm")
    known = _engines()[name]
    if version is None:
        return known[0]
    known = tuple(sorted(known, key=lambda engine_: Version(engine_.version)))
    return next((engine_ for engine_ in reversed(known) if Version(engine_.version) <= Version(version)), known[0])


def versions(name: str) -> tuple[str, ...]:
    """The known versions of an engine. The first is the default."""
    return tuple(engine_.version for engine_ in _engines()[name])


def planned_for(deployment: Deployment) -> tuple[Engine, list[str]]:
    """The engine of a deployment in the version of its set's lock, with notes for the plan.

    Raises:
        ConfigError: there is no engine of this name.
    """
    data = deployment.data
    version = setlock.version_of(deployment, options.table(engine(data.engine).table).distribution)
    planned = engine(data.engine, version)
    notes = [planned.note] if planned.note else []
    if version is not None and Version(version) != Version(planned.version):
        notes.append(
            f"the lock of the set {data.set} has {planned.name} {version}, which gracefarm does not know; gracefarm "
            f"uses the options and environment variables of {planned.name} {planned.version}"
        )
    return planned, notes


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the layers are divided among the ranks of a stage.

    vLLM divides experts among the ranks of all replicas, and the other weights among the ranks of one replica (0.26.0 and
    0.33.0, fused_moe/config.py).
    """

    tp: int
    dp: int = 1
    "Replicas that share the experts. A model without experts has 1 here, since its replicas share nothing."
    expert_parallel: bool = False
    "Each rank has whole experts instead of a part of each."
    batched: int = 2048
    "Tokens of one step, which a layer with a window needs in addition to the window."
    cache_bytes: int = BYTES
    "Bytes of an element of the KV cache."
    expert_multiple: int = 1
    "Columns of MXFP4 experts are padded to a multiple of this."
    hidden_multiple: int = 1
    "Their hidden size is padded to a multiple of this."

    @property
    def expert_ranks(self) -> int:
        """Number of ranks that share the experts of a layer. Their order is replica * tp + the rank within the stage."""
        return self.tp * self.dp

    @property
    def by_tokens(self) -> bool:
        """Whether the ranks of a replica divide the tokens of a layer with experts, and hold its shared experts whole.

        vLLM's use_sequence_parallel_moe (config/parallel.py). Mixtral does not use it (`exchange_ranks`).
        """
        return self.expert_parallel and self.tp > 1 and self.dp > 1


def exchange_ranks(model: Model, split: Split) -> int:
    """Number of ranks that exchange tokens with each other: those with the same rank in their replica, or the ranks of all.

    The latter only where the ranks of a replica divide the tokens (all2all.py), which Mixtral's code never does (mixtral.py).
    """
    return split.expert_ranks if split.by_tokens and model.architecture != "MixtralForCausalLM" else split.dp


def mxfp4_padding(sm: int) -> tuple[int, int]:
    """Multiples to which vLLM 0.26.0 pads columns and hidden size of MXFP4 experts. They depend on the kernel for the GPU.

    The kernels: Triton for Hopper, TensorRT-LLM for data center Blackwell, else Marlin (fused_moe/oracle/mxfp4.py).
    """
    return (64, 1) if sm == 90 else (256, 256) if 100 <= sm < 110 else (128, 256)


def refusal(engine_: Engine, model: Model, split: Split) -> str | None:
    """Why the engine refuses to split this model in this way; None: it accepts."""
    tp = split.tp
    if model.architecture not in ARCHITECTURES or (engine_.uneven and (model.architecture not in DENSE or model.quantization)):
        return f"the planner knows how {engine_.name} splits Llama in 16 bit, but not {model.architecture}"
    if engine_.uneven:
        return _uneven(engine_, model, tp)
    rows = vocab(engine_, model, tp)
    for what, number, ranks in (
        ("attention heads", model.heads, tp),
        *_columns(model, split),
        ("rows of the padded vocabulary", rows, tp),
    ):
        if number % ranks:
            return f"{sizes(tp, ranks)}: {engine_.name} splits evenly, but {number} {what} are not divisible by {ranks}"
    if not model.latent and model.kv_heads % tp and tp % model.kv_heads:
        return (
            f"tp {tp}: {engine_.name} requires that tp divides the number of KV heads ({model.kv_heads}), or is a multiple of "
            "this number"
        )
    return _blocks(engine_, model, split) or _whole_experts(engine_, model, split)


def sizes(tp: int, ranks: int) -> str:
    """The sizes of a split for messages."""
    return f"tp {tp}" if ranks <= tp else f"tp {tp} dp {ranks // tp}"


def _uneven(engine_: Engine, model: Model, tp: int) -> str | None:
    if tp <= model.kv_heads:
        return None
    if tp % model.kv_heads:
        return (
            f"tp {tp}: if tp is larger than the number of KV heads ({model.kv_heads}), {engine_.name} requires that tp is a "
            f"multiple of this number; a tp from 1 to {model.kv_heads} works"
        )
    return (
        f"tp {tp}: without quantisation, {engine_.name} assigns no query heads to ranks {model.kv_heads} to {tp - 1}; "
        f"a tp from 1 to {model.kv_heads} works"
    )


def _columns(model: Model, split: Split) -> list[tuple[str, int, int]]:
    """The parts that are split by columns: MLPs, experts, shared experts. Each with its columns, and the number of ranks."""
    columns = []
    if model.experts is None or len(model.experts.layers) < model.layers:
        columns.append(("MLP columns", model.mlp, split.tp))
    if model.experts and not split.expert_parallel:
        columns.append(("columns of an expert", model.experts.columns, split.expert_ranks))
    if model.experts and model.experts.shared_columns and not split.by_tokens:
        columns.append(("columns of the shared experts", model.experts.shared_columns, split.tp))
    return columns


def _whole_experts(engine_: Engine, model: Model, split: Split) -> str | None:
    """Check the distribution of whole experts.

    vLLM's loader of gpt-oss drops the remainder (gpt_oss.py). vLLM does not refuse ranks without experts; the planner does.
    """
    if not model.experts or not split.expert_parallel:
        return None
    count, ranks = model.experts.count, split.expert_ranks
    if count < ranks:
        return (
            f"{sizes(split.tp, ranks)}: with {count} experts, some of the {ranks} ranks would have no expert, and deploy "
            "does not plan such layouts"
        )
    if count % ranks and model.architecture == "GptOssForCausalLM":
        return f"{sizes(split.tp, ranks)}: {engine_.name} requires that the {count} experts are divisible by {ranks} ranks"
    return None


def _blocks(engine_: Engine, model: Model, split: Split) -> str | None:
    """Check that each rank has whole blocks and groups of weights (vLLM 0.26.0: fp8_utils.py, fp8.py, marlin_utils.py)."""
    quantization, tp = model.quantization, split.tp
    if quantization is None or split.expert_ranks == 1:
        return None
    size = (
        quantization.block[0] if quantization.block else quantization.group if quantization.method in ("int", "gptq") else None
    )
    if size is None:
        return None
    attention = [("rows of queries", model.heads * model.head_dim, tp)] if quantization.block and not model.latent else []
    for what, number, ranks in (*attention, *_columns(model, split)):
        if ranks > 1 and number // ranks % size:
            return (
                f"{sizes(tp, ranks)}: {engine_.name} requires that the {number // ranks} {what} on each rank are divisible "
                f"by {size}, the block size of the {quantization.name} weights"
            )
    return None


def gpu_refusal(engine_: Engine, model: Model, sm: int) -> str | None:
    """Why the engine cannot run these weights on a GPU with this compute capability; None: it can."""
    if model.quantization and sm < least_sm(model.quantization):
        least = least_sm(model.quantization)
        return (
            f"{engine_.name} {engine_.version} requires compute capability {least // 10}.{least % 10} for "
            f"{model.quantization.name} weights, but this GPU has {sm // 10}.{sm % 10}"
        )
    return None


def with_experts(engine_: Engine, model: Model, split: Split, forced: bool | None) -> Split:
    """The split with whole experts if deploy.toml says so, or if the engine cannot divide these experts."""
    whole = replace(split, expert_parallel=True)
    if model.experts is None:
        return split
    if forced is not None:
        return whole if forced else split
    return whole if refusal(engine_, model, split) and not refusal(engine_, model, whole) else split


def require(engine_: Engine, model: Model, split: Split, pp: int, forced: bool | None = None, most: int = 64) -> None:
    """Raise LayoutError if the engine refuses the split, or this number of GPUs.

    `forced`: expert_parallel of deploy.toml. `most`: the largest tp for which there are GPUs. Both determine the remedy.
    """
    reason = refusal(engine_, model, split)
    if reason:
        raise LayoutError(reason, remedy=_other_split(engine_, model, split, forced, most))
    world = split.expert_ranks * pp
    if model.architecture == "GptOssForCausalLM" and model.experts and model.experts.columns % world:
        # An assertion in gpt_oss.py (0.26.0 and 0.33.0), also with pipeline parallelism and with expert parallelism.
        raise LayoutError(
            f"{sizes(split.tp, split.expert_ranks)} pp {pp}: {engine_.name} requires that the {model.experts.columns} "
            f"columns of an expert are divisible by the number of GPUs, which is {world}",
            remedy="set tensor_parallel, pipeline_parallel and data_parallel in [layout] to values whose product divides "
            f"{model.experts.columns}",
        )


def _other_split(engine_: Engine, model: Model, split: Split, forced: bool | None, most: int) -> str:
    """The remedy for a refused split: changes of one key of [layout] with which the engine accepts it."""
    ways = []
    if others := legal(engine_, model, most, split, forced):
        ways.append(f"set tensor_parallel in [layout] to {_one_of(others)}")
    if model.experts and forced is not None and not refusal(engine_, model, replace(split, expert_parallel=not forced)):
        ways.append(f"set expert_parallel in [layout] to {str(not forced).lower()}")
    if split.dp > 1:
        fewer = [dp for dp in range(1, split.dp) if not _refused_with(engine_, model, replace(split, dp=dp), forced)]
        ways += [f"set data_parallel in [layout] to {_one_of(fewer)}"] if fewer else []
    if ways:
        return ", or ".join(ways)
    if engine_.uneven:
        return 'set engine = "vllm" in deploy.toml'
    return "use more nodes, or remove tensor_parallel, pipeline_parallel, data_parallel and expert_parallel from [layout]"


def _one_of(values: Sequence[int]) -> str:
    return ("" if len(values) == 1 else "one of: ") + ", ".join(map(str, values))


def _refused_with(engine_: Engine, model: Model, split: Split, forced: bool | None) -> bool:
    """Whether the engine refuses this tp and dp, with split or whole experts as deploy.toml says."""
    return refusal(engine_, model, with_experts(engine_, model, replace(split, expert_parallel=False), forced)) is not None


def legal(
    engine_: Engine, model: Model, most: int = 64, like: Split | None = None, forced: bool | None = None
) -> tuple[int, ...]:
    """Every tp up to `most` that the engine accepts with the replicas of `like`, and the experts that deploy.toml says."""
    like = like or Split(tp=1)
    return tuple(tp for tp in range(1, most + 1) if not _refused_with(engine_, model, replace(like, tp=tp), forced))


def part(total: int, rank: int, tp: int, multiple: int = 1) -> tuple[int, int]:
    """Start and size of a rank's part, in whole multiples; the first ranks get one more (Aphrodite 0.6.4, parallel_state)."""
    whole, rest = divmod(total // multiple, tp)
    return (whole * rank + min(rest, rank)) * multiple, (whole + (rank < rest)) * multiple


def kv_heads(engine_: Engine, model: Model, tp: int) -> tuple[int, ...]:
    """KV heads of each rank. If the engine replicates heads, several ranks have the same one."""
    if engine_.replicates and tp > model.kv_heads:
        return (1,) * tp
    return tuple(part(model.kv_heads, rank, tp)[1] for rank in range(tp))


def vocab(engine_: Engine, model: Model, tp: int) -> int:
    """Rows of the embedding, including padding."""
    multiple = engine_.vocab_multiple or tp
    return -(-model.vocab // multiple) * multiple


def default_partition(layers: int, pp: int) -> tuple[int, ...]:
    """Aphrodite's default partition: equal stages, and the last one gets the remainder."""
    return (layers // pp,) * (pp - 1) + (layers // pp + layers % pp,)


def check(engine_: Engine, given: Mapping[str, GivenValue], arch: str) -> None:
    """Check that [engine_options] has no option that the plan sets, that is secret, or that is known to fail.

    Raises:
        ConfigError: with the option and the reason.
    """
    for key in given:
        name = key.replace("_", "-").lstrip("-")
        option = options.table(engine_.table).find(f"--{name}")
        name = option.name if option else {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size"}.get(name, name)
        if name in engine_.refused:
            raise ConfigError(
                f"[engine_options] {key} is not allowed: {engine_.refused[name]}",
                remedy=f"remove {key} from [engine_options] in deploy.toml",
            )
    _check_cache(engine_, given, arch)


def _check_cache(engine_: Engine, given: Mapping[str, GivenValue], arch: str) -> None:
    """Refuse options for which Aphrodite requires xformers, since no set for aarch64 has both."""
    if engine_.name != "aphrodite" or arch != "aarch64":
        return
    options_ = {key.replace("_", "-"): value for key, value in given.items()}
    if str(options_.get("kv-cache-dtype", "auto")).startswith("fp8"):
        raise ConfigError(
            "[engine_options] kv-cache-dtype: with fp8, this version of aphrodite requires xformers, but its sets for aarch64 "
            "do not contain xformers",
            remedy="remove kv-cache-dtype from [engine_options]; the default is auto",
        )
    if int(str(options_.get("block-size", 16))) % 16:
        raise ConfigError(
            "[engine_options] block-size: a value not divisible by 16 requires xformers, but the sets for aarch64 do not "
            "contain xformers",
            remedy="remove block-size from [engine_options]; the default is 16",
        )


def arguments(engine_: Engine, given: Mapping[str, GivenValue]) -> list[str]:
    """[engine_options] as arguments. Raises ConfigError if the engine does not have an option or value."""
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
    """Check that the engine has every option of a command line, and its value is allowed. Raises ConfigError."""
    options.table(engine_.table).check(words)
