"""The memory model: the known table, real slices of a real checkpoint, and sums that must come out. Never a speed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.nodes.config import LayoutConfig
from deploy.nodes.facts import Gpu
from deploy.planning import architectures, choosing, engines, hardware, layouts, models, placement, shards
from deploy.planning.engines import Engine, Split
from deploy.planning.layouts import Candidate, Question
from deploy.planning.placement import Machine
from deploy.planning.shapes import BYTES, Model
from deploy.planning.shards import GIB
from gracefarm.errors import LayoutError

APHRODITE, VLLM = engines.engine("aphrodite"), engines.engine("vllm")


def llama(size: str = "405B") -> Model:
    found = models.built_in(f"meta-llama/Llama-3.1-{size}-Instruct", "main")
    assert found
    return found


def parameters(model: Model) -> int:
    layer = sum(tensor.elements for tensor in architectures.layer_tensors(model, 0))
    return model.layers * layer + sum(tensor.elements for tensor in architectures.outer_tensors(model))


def weight_bytes(model: Model) -> int:
    """Bytes of all weights."""
    return parameters(model) * BYTES


def question(
    nodes: int, *, of: str = "gh200-96", engine: Engine = APHRODITE, size: str = "405B", **forced: object
) -> Question:
    return Question(
        engine=engine,
        model=llama(size),
        machines=placement.machines_of(hardware.kinds()[of], nodes),
        forced=LayoutConfig.model_validate(forced),
    )


def test_the_model_has_the_bytes_that_everybody_knows() -> None:
    assert parameters(llama()) == 405_853_388_800
    assert round(weight_bytes(llama()) / GIB, 1) == 756.0
    assert round(parameters(llama("70B")) / 1e9, 2) == 70.55
    assert round(parameters(llama("8B")) / 1e9, 2) == 8.03


# Worked out by hand for the table of issue 5: 3 GiB beside weights and cache, 2 GiB of cache at least, gmu 0.90.
TABLE = [
    # nodes, tp, pp, partition (None: the planner's), GiB per GPU, GiB offloaded, thousand tokens in all, for one request
    (3, 3, 1, None, 257.6, 177, 11, 11),
    (3, 1, 3, None, 253.3, 172, 12, 4),
    (4, 4, 1, None, 189.0, 108, 17, 17),
    (8, 4, 2, None, 94.5, 13.5, 33, 17),
    (9, 3, 3, None, 86.3, 5.3, 33, 11),
    (10, 5, 2, None, 78.9, 0, 68, 34),
    (10, 2, 5, (25, 25, 26, 25, 25), 77.2, 0, 118, 24),
    (10, 1, 10, (12, 13, 13, 13, 13, 13, 13, 12, 12, 12), 77.2, 0, 118, 12),
    (10, 1, 10, (12,) * 9 + (18,), 110.8, 30, None, None),
    (12, 2, 6, None, 64.3, 0, 467, None),
    (12, 4, 3, None, 63.3, 0, 492, None),
    (16, 8, 2, None, 47.3, 0, 1190, None),
    (16, 4, 4, (31, 31, 31, 33), 50.0, 0, 1050, None),
]


@pytest.mark.parametrize(("nodes", "tp", "pp", "partition", "gib", "offload", "tokens", "request_tokens"), TABLE)
def test_the_table(
    nodes: int,
    tp: int,
    pp: int,
    partition: tuple[int, ...] | None,
    gib: float,
    offload: float,
    tokens: int | None,
    request_tokens: int | None,
) -> None:
    found = layouts.evaluate(question(nodes), tp, pp, partition)
    assert found.memory.weights_gib == pytest.approx(gib, abs=0.051)
    assert found.layout.offload_gib == pytest.approx(offload, abs=0.5 if offload >= 30 else 0.05)
    if tokens:
        assert found.memory.cache_tokens / 1e3 == pytest.approx(tokens, rel=0.06 if offload else 0.01)
    if request_tokens:
        assert found.memory.request_tokens / 1e3 == pytest.approx(request_tokens, abs=0.55)


@pytest.mark.parametrize(
    ("nodes", "name", "gib", "offload"),
    [
        (3, "tp3 pp1", 257.6, 176.6),
        (4, "tp4 pp1", 189.0, 108.0),
        (8, "tp4 pp2", 94.5, 13.5),
        (9, "tp3 pp3", 86.3, 5.3),
        (10, "tp5 pp2", 78.9, 0),
        (12, "tp4 pp3", 63.3, 0),
    ],
)
def test_the_planner_chooses_what_the_table_has(nodes: int, name: str, gib: float, offload: float) -> None:
    best = choosing.choose(question(nodes)).best
    assert (best.layout.name, best.layout.offload_gib) == (name, offload)
    assert best.memory.weights_gib == pytest.approx(gib, abs=0.05)


def test_ten_is_the_fewest_without_host_memory_and_three_with_it() -> None:
    assert choosing.choose(question(9)).best.layout.offload_gib > 0
    assert choosing.choose(question(10)).best.layout.offload_gib == 0
    assert choosing.choose(question(3)).best.layout.offload_gib > 0
    with pytest.raises(
        LayoutError, match=r"301 GiB of the 432 GiB of host memory on k0 would be pinned for weights; the maximum is 60%"
    ):
        choosing.choose(question(2))


def test_our_partition_is_the_least_that_any_partition_can_be() -> None:
    """Against all splits of a small model, one by one."""
    small = small_model(layers=7)
    for tp, pp in ((1, 3), (2, 3), (2, 4), (1, 7)):
        ours = shards.balance(APHRODITE, small, Split(tp=tp), pp)
        assert sum(ours) == 7
        assert fullest(small, tp, ours) == min(fullest(small, tp, split) for split in splits(7, pp))


def splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    if stages == 1:
        return [(layers,)]
    return [(first, *rest) for first in range(1, layers - stages + 2) for rest in splits(layers - first, stages - 1)]


def fullest(of: Model, tp: int, partition: tuple[int, ...]) -> int:
    return max(share.weights for stage in shards.shares(APHRODITE, of, Split(tp=tp), partition) for share in stage)


def small_model(**changes: object) -> Model:
    numbers = {"layers": 3, "hidden": 32, "heads": 16, "kv_heads": 8, "head_dim": 4, "mlp": 53, "vocab": 101, "max_len": 512}
    return Model.model_validate({"repo": "tiny/llama", "revision": "0" * 40, **numbers, **changes})


# The engine's own rule, on real bytes


def checkpoint(of: Model, path: Path) -> dict[str, tuple[list[int], bytes]]:
    """A safetensors file of random weights, written and read back by its format: 8 bytes of length, JSON, data."""
    q, kv = of.heads * of.head_dim, of.kv_heads * of.head_dim
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [of.vocab, of.hidden], "model.norm.weight": [of.hidden]}
    if not of.tied:
        shapes["lm_head.weight"] = [of.vocab, of.hidden]
    for number in range(of.layers):
        prefix = f"model.layers.{number}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": [q, of.hidden],
            prefix + "self_attn.k_proj.weight": [kv, of.hidden],
            prefix + "self_attn.v_proj.weight": [kv, of.hidden],
            prefix + "self_attn.o_proj.weight": [of.hidden, q],
            prefix + "mlp.gate_proj.weight": [of.mlp, of.hidden],
            prefix + "mlp.up_proj.weight": [of.mlp, of.hidden],
            prefix + "mlp.down_proj.weight": [of.hidden, of.mlp],
            prefix + "input_layernorm.weight": [of.hidden],
            prefix + "post_attention_layernorm.weight": [of.hidden],
        }
        if of.attention_bias:
            shapes |= {
                f"{prefix}self_attn.{name}_proj.bias": [size]
                for name, size in zip("qkvo", (q, kv, kv, of.hidden), strict=True)
            }
        if of.mlp_bias:
            shapes |= {
                f"{prefix}mlp.{name}_proj.bias": [size]
                for name, size in (("gate", of.mlp), ("up", of.mlp), ("down", of.hidden))
            }
    header, data, source = {}, b"", random.Random(1)
    for name, shape in shapes.items():
        block = source.randbytes(2 * math.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(block)]}
        data += block
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    read = json.loads(whole[8 : 8 + length])
    body = whole[8 + length :]
    return {name: (entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in read.items()}


def cut(shape: list[int], data: bytes, axis: int, start: int, length: int) -> bytes:
    if axis == 0:
        row = 2 * math.prod(shape[1:])
        return data[start * row : (start + length) * row]
    width = shape[1] * 2
    return b"".join(data[row * width + start * 2 : row * width + (start + length) * 2] for row in range(shape[0]))


def loaded(of: Model, tensors: dict[str, tuple[list[int], bytes]], tp: int, partition: tuple[int, ...]) -> list[list[int]]:
    """Bytes that each rank of each stage loads, by the engine's rule written down a second time, tensor by tensor."""
    found = []
    for stage, layers in enumerate(partition):
        first = sum(partition[:stage])
        row = []
        for rank in range(tp):
            kv = [of.kv_heads // tp + (of.kv_heads % tp > peer) for peer in range(tp)]
            columns = [of.mlp // tp + (of.mlp % tp > peer) for peer in range(tp)]
            group = of.heads // of.kv_heads * of.head_dim
            places = {
                "q_proj": (sum(kv[:rank]) * group, kv[rank] * group),
                "k_proj": (sum(kv[:rank]) * of.head_dim, kv[rank] * of.head_dim),
                "gate_proj": (sum(columns[:rank]), columns[rank]),
            }
            places |= {"o_proj": places["q_proj"], "v_proj": places["k_proj"]}
            places |= {"up_proj": places["gate_proj"], "down_proj": places["gate_proj"]}
            count = 0
            for number in range(first, first + layers):
                for name, (shape, data) in tensors.items():
                    if not name.startswith(f"model.layers.{number}."):
                        continue
                    module, kind = name.split(".")[-2:]
                    across = module in ("o_proj", "down_proj")
                    if "norm" in module or (across and kind == "bias"):
                        count += len(data)
                    else:
                        count += len(cut(shape, data, 1 if across else 0, *places[module]))
            rows = -(-of.vocab // tp)
            padded = rows * of.hidden * 2
            last = stage == len(partition) - 1
            count += padded * ((stage == 0) + last - (of.tied and stage == 0 and last))
            count += len(tensors["model.norm.weight"][1]) if last else 0
            row.append(count)
        found.append(row)
    return found


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize(
    ("tp", "partition"), [(1, (3,)), (2, (1, 2)), (3, (3,)), (5, (2, 1)), (5, (1, 1, 1)), (7, (3,)), (8, (3,))]
)
def test_bytes_per_rank_are_what_a_real_checkpoint_gives_when_it_is_sliced(
    tmp_path: Path, tp: int, partition: tuple[int, ...], changes: dict[str, object]
) -> None:
    of = small_model(**changes)
    tensors = checkpoint(of, tmp_path / "model.safetensors")
    predicted = [[share.weights for share in stage] for stage in shards.shares(APHRODITE, of, Split(tp=tp), partition)]
    assert predicted == loaded(of, tensors, tp, partition)


any_model = st.builds(
    lambda kv, group, dim, **rest: Model(
        repo="a/b", revision="0" * 40, kv_heads=kv, heads=kv * group, head_dim=dim, max_len=4096, **rest
    ),
    kv=st.integers(1, 16),
    group=st.integers(1, 16),
    dim=st.sampled_from([16, 64, 128]),
    layers=st.integers(1, 40),
    hidden=st.integers(1, 64).map(lambda one: one * 64),
    mlp=st.integers(1, 60000),
    vocab=st.integers(1, 200000),
    tied=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)


@settings(deadline=None, max_examples=300)
@given(any_model, st.data())
def test_ranks_sum_to_the_model_and_what_is_held_twice(of: Model, data: st.DataObject) -> None:
    """All ranks hold the model, whole copies of what is not cut, padding, and a tied table at both ends; nothing else."""
    engine = data.draw(st.sampled_from([APHRODITE, VLLM]))
    tp = data.draw(st.sampled_from([size for size in engines.legal(engine, of, 16) if size <= of.kv_heads]))
    pp = data.draw(st.integers(1, min(of.layers, 12)))
    partition = shards.balance(engine, of, Split(tp=tp), pp)
    assert sum(partition) == of.layers
    assert min(partition) >= 1
    total = sum(share.weights for stage in shards.shares(engine, of, Split(tp=tp), partition) for share in stage)
    whole = 2 * of.hidden + (of.hidden if of.attention_bias else 0) + (of.hidden if of.mlp_bias else 0)
    copies = (tp - 1) * (of.layers * whole + of.hidden)
    padding = (engines.vocab(engine, of, tp) - of.vocab) * of.hidden * (1 if of.tied and pp == 1 else 2)
    tied_twice = of.vocab * of.hidden if of.tied and pp > 1 else 0
    assert total == weight_bytes(of) + BYTES * (copies + padding + tied_twice)
    cache = sum(share.token for stage in shards.shares(engine, of, Split(tp=tp), partition) for share in stage)
    assert cache == BYTES * 2 * of.layers * of.kv_heads * of.head_dim


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.sampled_from(["405B", "70B", "8B"]), st.sampled_from([APHRODITE, VLLM]))
def test_whatever_is_chosen_fits_every_gpu(nodes: int, size: str, engine: Engine) -> None:
    if size == "405B" and nodes < 3:
        with pytest.raises(LayoutError):
            choosing.choose(question(nodes, size=size, engine=engine))
        return
    found = choosing.choose(question(nodes, size=size, engine=engine))
    for candidate in (found.best, *found.others):
        assert_fits(engine, llama(size), candidate)


def assert_fits(engine: Engine, of: Model, one: Candidate) -> None:
    """Every GPU holds its weights, what is beside them, and the cache for every token that is promised."""
    chosen, memory = one.layout, one.memory
    assert len(one.slots) == chosen.world
    held = [share for stage in shards.shares(engine, of, Split(tp=chosen.tp), chosen.partition) for share in stage]
    for share, slot in zip(held, one.slots, strict=True):
        used = share.weights - share.away(chosen.offload_gib) + layouts.RESERVE + memory.cache_tokens * share.token
        assert used <= 0.9 * slot.gpu.total
    assert chosen.max_model_len <= memory.request_tokens
    assert memory.full_length >= 1
    assert memory.host_gib <= layouts.HOST_SHARE * 432


# What is refused, and with which sentence


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        (
            {"tensor_parallel": 10},
            r"tp 10: if tp is larger than the number of KV heads \(8\), aphrodite requires that tp is a multiple of this",
        ),
        ({"tensor_parallel": 5, "pipeline_parallel": 3}, "tp5 pp3 requires 15 GPUs, but there are 10"),
        (
            {"tensor_parallel": 1, "pipeline_parallel": 10, "partition": [12] * 9 + [18], "cpu_offload_gib": 0},
            "a GPU has 110.8 GiB of weights",
        ),
        ({"tensor_parallel": 1, "partition": [12] * 10}, "partition has 120 layers, but the model has 126"),
        ({"pipeline_parallel": 2, "partition": [60, 60, 6]}, "partition has 3 stages, but pipeline_parallel is 2"),
        ({"max_model_len": 131073}, "the model was trained for 131072 tokens"),
        (
            {"tensor_parallel": 5, "pipeline_parallel": 2, "max_model_len": 40000},
            "room for a request of 33872 tokens .* 2 parts",
        ),
        ({"max_num_seqs": 4096}, "a step has 2048 tokens"),
        (
            {"tensor_parallel": 4, "pipeline_parallel": 2, "cpu_offload_gib": 5},
            r"94.5 GiB of weights \(5 GiB of them offloaded\)",
        ),
        ({"cpu_offload_gib": 300}, "304 GiB of the"),
        ({"gpu_memory_utilization": 0.03}, "the engine may use only 2.9 GiB"),
    ],
)
def test_a_forced_layout_is_refused_with_the_limit(forced: dict[str, object], words: str) -> None:
    with pytest.raises(LayoutError, match=words) as caught:
        choosing.choose(question(10, **forced))
    assert caught.value.remedy


def test_a_forced_layout_that_fits_is_taken_as_it_is() -> None:
    found = choosing.choose(
        question(10, tensor_parallel=5, pipeline_parallel=2, max_model_len=2000, max_num_seqs=128)
    ).best.layout
    assert (found.tp, found.pp, found.partition, found.max_model_len, found.max_num_seqs) == (5, 2, (63, 63), 2000, 128)


def test_rejected_layouts_say_why() -> None:
    rejected = {rejection.layout: rejection.reason for rejection in choosing.choose(question(16)).rejected}
    for tp in range(9, 16):
        assert "requires that tp is a multiple of this number" in rejected[f"tp{tp}"]
    assert "assigns no query heads to ranks 8 to 15" in rejected["tp16"]
    overload = {rejection.layout: rejection.reason for rejection in choosing.choose(question(10)).rejected}
    assert "the last stage has 110.8 GiB of weights" in overload["tp1 pp10 with the engine's default partition 12x9,18"]


def test_vllm_divides_and_replicates() -> None:
    assert engines.legal(VLLM, llama(), 16) == (1, 2, 4, 8, 16)
    assert engines.kv_heads(VLLM, llama(), 16) == (1,) * 16
    found = layouts.evaluate(question(16, engine=VLLM), 16, 1)
    assert found.memory.weights_gib > weight_bytes(llama()) / 16 / GIB  # K and V twice
    with pytest.raises(LayoutError, match="128 attention heads are not divisible by 5"):
        choosing.choose(question(10, engine=VLLM, tensor_parallel=5))


def test_one_cache_for_all_stages_is_not_cut() -> None:
    ours, theirs = (layouts.evaluate(question(10, engine=engine), 2, 5).memory for engine in (APHRODITE, VLLM))
    assert theirs.request_tokens == theirs.cache_tokens
    assert ours.request_tokens == pytest.approx(ours.cache_tokens / 5, abs=16)


def test_ranks_follow_the_engines_order_and_spares_stay_out() -> None:
    gpu = Gpu(name="GH200", total=97871 << 20, free=97871 << 20)

    def machine(name: str, address: str, gpus: int = 1) -> Machine:
        return Machine(name=name, private=address, gpus=(gpu,) * gpus, host=432 * GIB)

    fleet = [machine("k0", "10.0.0.7"), machine("k1", "10.0.0.10"), machine("k2", "10.0.0.9"), machine("k3", "10.0.0.2")]
    assert [slot.machine.name for slot in placement.place(fleet, 3)] == ["k0", "k1", "k2"]  # "10.0.0.10" < "10.0.0.9" as text
    mixed = [machine("k0", "10.0.0.7", 2), machine("k1", "10.0.0.1", 4), machine("k2", "10.0.0.2", 1)]
    assert [slot.machine.name for slot in placement.place(mixed, 7)] == ["k0"] * 2 + ["k2"] + ["k1"] * 4


def test_the_smallest_gpu_is_what_counts() -> None:
    asked = question(10)
    small = Machine(name="k4", private="10.0.0.5", gpus=(Gpu(name="GH200", total=80 << 30, free=0),), host=432 * GIB)
    machines = (*asked.machines[:4], small, *asked.machines[5:])
    found = layouts.evaluate(Question(engine=APHRODITE, model=llama(), machines=machines), 5, 2)
    assert found.memory.budget_gib == 72.0
    assert found.layout.offload_gib > 10


def test_the_engines_check_of_its_swap_space_is_made_before_it_is() -> None:
    machines = tuple(dataclasses.replace(machine, host=40 * GIB) for machine in question(16, size="8B").machines)
    asked = Question(engine=APHRODITE, model=llama("8B"), machines=machines)
    with pytest.raises(
        LayoutError, match=r"tp 8: aphrodite would reserve 32 GiB of swap space on k0, but the maximum is 70% of the 40 GiB"
    ):
        layouts.evaluate(asked, 8, 1)
    assert layouts.evaluate(asked, 7, 1).layout.tp == 7
