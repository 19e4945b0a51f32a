"""The speed model: its constants are what the H200 table gives, its rows keep their bounds, and what it chooses follows."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from deploy.fleet import probe
from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment
from deploy.nodes.facts import Facts, Nic, NodeFacts, Rdma
from deploy.planning import accuracy, hardware, links, models, plans, speed, suppose
from deploy.planning.accuracy import MeasuredRun
from deploy.planning.plans import ServePlan
from deploy.remote import network
from gracefarm.errors import ConfigError, LayoutError, UsageError
from tests.deploy.test_bad_input import TOML, prepared, told
from tests.deploy.test_init import deploy


def run(name: str) -> MeasuredRun:
    return next(each for each in accuracy.runs() if each.name == name)


TP1, TP2, TP4 = (run(name) for name in ("H200, tp1, 8 layers", "H200, tp2, 16 layers, NVLink", "H200, tp4, 32 layers, NVLink"))
EAGER, TCP = (run(f"H200, tp2, 16 layers, eager, NCCL over {way}") for way in ("NVLink", "TCP (loopback)"))


def ms(of: MeasuredRun, streams: int) -> float:
    assert of.ms
    return of.ms[streams]


# Worked out by hand: a layer has 6.375 GB, the output layer 4.20 GB; gpu.md's table has the sums.
READ = {TP1.name: 55.2e9, TP2.name: 53.1e9, TP4.name: 52.1e9}


def test_the_constants_are_what_the_table_gives() -> None:
    efficiency = READ[TP1.name] / (ms(TP1, 1) / 1e3 - 8 * speed.LAYER_S) / 4.8e12
    assert efficiency == pytest.approx(speed.EFFICIENCY, rel=0.005)
    local = statistics.mean(
        (ms(of, 1) / 1e3 - READ[of.name] / (4.8e12 * efficiency) - layers * speed.LAYER_S) / (2 * layers)
        for of, layers in ((TP2, 16), (TP4, 32))
    )
    assert local == pytest.approx(speed.LOCAL_S, rel=0.05)
    stream = statistics.mean((ms(of, 64) - ms(of, 1)) / 63e3 for of in (TP1, TP2, TP4))
    assert stream == pytest.approx(speed.STREAM_S, rel=0.05)
    more = {streams: (ms(TCP, streams) - ms(EAGER, streams)) / 1e3 / 32 for streams in (1, 64)}
    size = 2 * 16384
    gb_s = 63 * size / (more[64] - more[1]) / 1e9
    assert gb_s == pytest.approx(speed.SOCKET_GB_S, rel=0.01)
    assert (more[1] - size / (gb_s * 1e9)) / 2 == pytest.approx(speed.NETWORK_STEP_S, rel=0.02)


def test_what_is_read_is_what_the_table_says() -> None:
    for of in (TP1, TP2, TP4):
        (stage,), _, _ = accuracy.loads(of)
        assert stage.resident == pytest.approx(READ[of.name], rel=0.002)


@pytest.mark.parametrize("row", accuracy.rows(), ids=lambda row: f"{row.name}, {row.streams}")
def test_the_accuracy_table_keeps_its_bounds(row: accuracy.AccuracyRow) -> None:
    assert row.holds != bool(row.why), "what is beyond its bound says why, and nothing else does"
    assert row.source


def test_what_was_predicted_before_a_run_is_what_the_planner_still_predicts() -> None:
    """A better model may say otherwise; then the row keeps what was committed, and this test names the difference."""
    for of in accuracy.runs():
        for streams, committed in (of.committed or {}).items():
            assert accuracy.predict(of, streams) == pytest.approx(committed, rel=0.01), of.name


def test_a_row_beyond_its_bound_says_so() -> None:
    assert TP1.ms
    wrong = TP1.model_copy(update={"ms": {1: TP1.ms[1] * 1.5}})
    (row,) = accuracy.rows((wrong,))
    assert row.error == pytest.approx(0.5, abs=0.02)
    assert not row.holds
    assert accuracy.rows((wrong.model_copy(update={"bound": None}),))[0].holds
    (row,) = accuracy.rows((TP1.model_copy(update={"ms": {1: TP1.ms[1]}, "again": {1: TP1.ms[1] * 1.5}}),))
    assert row.error == pytest.approx(0, abs=0.02)
    assert row.error_again == pytest.approx(0.5, abs=0.02)
    assert not row.holds, "the bound is for both runs"


def test_deploy_plan_shows_them(tmp_path: Path) -> None:
    done = deploy(tmp_path, "plan", "--accuracy")
    assert done.returncode == 0
    assert "two nodes of eight H100, tp8 pp2" in done.stdout
    assert re.search(r"64 +2,630\.0 +1,268\.43 +\+107% +1,093\.83 +\+140% +25% EXCEEDED", done.stdout)
    rows = json.loads(deploy(tmp_path, "plan", "--accuracy", "--json").stdout.splitlines()[-1])
    assert len(rows) == len(accuracy.rows())
    assert {row["streams"] for row in rows} >= {1, 4, 16, 64, 256}
    (others,) = [row for row in rows if "DeepSeek-V3" in row["name"]]
    assert (others["measured"], others["bound"]) == (26.0, None)
    assert others["error"] == pytest.approx(0.48, abs=0.01)


def supposed(
    count: int, gpu: str = "gh200-96", repo: str = "meta-llama/Llama-3.1-8B", **data: object
) -> tuple[ServePlan, Deployment, Facts]:
    base = Deployment(
        path=Path("/nowhere/deploy.toml"),
        data=Config.model_validate({"engine": "vllm", "model": {"repo": repo}, **data}),
        nodes=(),
    )
    deployment, facts = suppose.suppose(hardware.named(gpu), count, base)
    model = models.built_in(repo, "0" * 40)
    assert model
    return plans.make(deployment, facts, model), deployment, facts


def planned(count: int, gpu: str = "gh200-96", repo: str = "meta-llama/Llama-3.1-8B", **data: object) -> ServePlan:
    return supposed(count, gpu, repo, **data)[0]


def test_many_streams_are_not_n_times_one() -> None:
    split = {"tensor_parallel": 2, "pipeline_parallel": 1, "max_num_seqs": 100}
    found = planned(2, repo="meta-llama/Llama-3.1-70B", layout=split).prediction
    assert found
    assert [level.streams for level in found.levels] == [1, 4, 16, 64]  # as many as deploy.toml lets in
    rates = [level.tokens_per_s / level.streams for level in found.levels]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    assert found.at(4) == found.levels[1].tokens_per_s
    assert found.levels[1].tokens_per_s < found.at(10) < found.levels[2].tokens_per_s
    assert found.at(1000) == found.levels[-1].tokens_per_s


def test_few_streams_read_few_experts_and_many_read_all() -> None:
    traffic = speed.Traffic(hidden=1, experts=128, per_token=8)
    assert traffic.touched(1) == pytest.approx(8 / 128)
    assert 0.98 < traffic.touched(64) < 1


# the objective


def test_a_small_model_is_served_by_one_node_and_the_others_are_named() -> None:
    """Once it became pp9 for $20.61 an hour."""
    found = planned(10)
    assert (found.layout.name, len(found.nodes), len(found.spares)) == ("tp1 pp1", 1, 9)
    assert found.prediction
    assert found.prediction.usd_per_hour == 2.29
    assert any(
        "1 node serves, 9 are not used (k1 to k9): with all nodes, one stream would not be noticeably faster" in note
        for note in found.notes
    )


def test_more_nodes_than_help_stay_unused() -> None:
    ten, sixteen = (planned(count, repo="meta-llama/Llama-3.1-405B") for count in (12, 16))
    assert len(ten.nodes) == len(sixteen.nodes)
    two, many = (planned(count, repo="meta-llama/Llama-3.1-70B") for count in (2, 10))
    assert two.prediction
    assert many.prediction
    assert len(many.nodes) == len(two.nodes)


def test_throughput_takes_replicas_and_cost_takes_none() -> None:
    speedy, wide, cheap = (planned(10, layout={"objective": word}) for word in ("speed", "throughput", "cost"))
    assert (wide.layout.dp, len(wide.nodes)) == (10, 10)
    assert (cheap.layout.dp, len(cheap.nodes)) == (1, 1)
    assert speedy.prediction
    assert wide.prediction
    assert wide.prediction.levels[-1].tokens_per_s > 1.5 * speedy.prediction.levels[-1].tokens_per_s
    assert wide.prediction.tokens_per_s == speedy.prediction.tokens_per_s


def test_nodes_that_replicas_could_use_are_not_called_useless() -> None:
    old = planned(4, engine="aphrodite", layout={"objective": "throughput"})
    assert any("deploy does not plan replicas of aphrodite" in note for note in old.notes) == bool(old.spares)


def test_a_cache_in_eight_bit_holds_twice_as_much() -> None:
    usual, half = (planned(1, engine_options={"kv-cache-dtype": word}).memory for word in ("auto", "fp8"))
    assert usual
    assert half
    assert half.token_bytes * 2 == usual.token_bytes
    assert half.cache_tokens == pytest.approx(2 * usual.cache_tokens, abs=16)


def test_cost_counts_nodes_not_only_speed() -> None:
    fast, cheap = (planned(8, repo="meta-llama/Llama-3.1-70B", layout={"objective": word}) for word in ("throughput", "cost"))
    assert fast.prediction
    assert cheap.prediction
    assert cheap.prediction.levels[-1].usd_per_mtok is not None
    assert fast.prediction.levels[-1].usd_per_mtok is not None
    assert cheap.prediction.levels[-1].usd_per_mtok <= fast.prediction.levels[-1].usd_per_mtok
    assert len(cheap.nodes) < len(fast.nodes)


def test_a_price_of_ones_own_comes_first(tmp_path: Path) -> None:
    for price, hour in (("5", 5.0), (None, 2.29)):
        words = ("plan", "--nodes", "10", "--engine", "vllm", "--model", "meta-llama/Llama-3.1-8B", "--json")
        done = deploy(tmp_path, *words, *(("--price", price) if price else ()))
        assert json.loads(done.stdout.splitlines()[-1])["prediction"]["usd_per_hour"] == hour


def with_gpus(names: tuple[str, ...], *more: tuple[str, ...]) -> ServePlan:
    """A plan for Llama 3.1 8B on nodes with these GPUs, one stage on each node."""
    layout = {"tensor_parallel": len(names), "pipeline_parallel": 1 + len(more)}
    _, deployment, facts = supposed(1 + len(more), "h200", layout=layout)
    nodes = []
    for node, kinds in zip(facts.nodes, (names, *more), strict=True):
        gpus = tuple(node.cuda.gpus[0].model_copy(update={"name": name}) for name in kinds)
        nodes.append(node.model_copy(update={"cuda": node.cuda.model_copy(update={"gpus": gpus})}))
    model = models.built_in("meta-llama/Llama-3.1-8B", "0" * 40)
    assert model
    return plans.make(deployment, Facts(nodes=tuple(nodes)), model)


def test_a_node_costs_as_much_as_its_gpus() -> None:
    """A node with two H200 once had the price of one with eight."""

    def hour(*gpus: tuple[str, ...]) -> float | None:
        prediction = with_gpus(*gpus).prediction
        assert prediction
        return prediction.usd_per_hour

    h200, h100, other = ("NVIDIA H200",), ("NVIDIA H100 80GB HBM3",), ("NVIDIA L4",)
    assert hour(h200 * 8) == 36.32
    assert hour(h200 * 2) == 9.08
    assert hour(h200, h100) == 4.54 + 2.79
    assert hour(h200, other) is None


def test_a_model_that_is_only_looked_at_is_planned_for_vllm(tmp_path: Path) -> None:
    words = ("plan", "--nodes", "2", "--gpu", "h200", "--model", "deepseek-ai/DeepSeek-V3")
    done = deploy(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "deepseek-ai/DeepSeek-V3 at main, vllm" in done.stdout
    told(tmp_path, 64, "how aphrodite splits Llama", *words, "--engine", "aphrodite")
    prepared(tmp_path, 'engine = "aphrodite"\n' + TOML)
    told(tmp_path, 64, "how aphrodite splits Llama", *words)


# replicas


def words_after(arguments: tuple[str, ...], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_replicas_on_whole_nodes_and_on_several() -> None:
    inside = planned(2, "h200", layout={"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 8})
    assert (inside.layout.world, words_after(inside.serve, "--data-parallel-size-local")) == (16, "4")
    assert "VLLM_RAY_DP_PACK_STRATEGY" not in inside.serve_env
    across = planned(4, layout={"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 2})
    assert words_after(across.serve, "--data-parallel-size") == "2"
    assert words_after(across.serve, "--data-parallel-backend") == "ray"
    assert "--data-parallel-size-local" not in across.serve
    assert across.serve_env["VLLM_RAY_DP_PACK_STRATEGY"] == "span"
    assert inside.memory
    assert inside.memory.cache_tokens == 8 * inside.memory.request_tokens
    with pytest.raises(LayoutError, match="a replica has 3 GPUs, and each node has 8 GPUs"):
        planned(2, "h200", layout={"tensor_parallel": 1, "pipeline_parallel": 3, "data_parallel": 2})
    with pytest.raises(LayoutError, match="tp4 pp1 dp3 requires 12 GPUs, but there are 8"):
        planned(1, "h200", layout={"tensor_parallel": 4, "pipeline_parallel": 1, "data_parallel": 3})


def test_replicas_require_equal_nodes() -> None:
    wanted = {"layout": {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 16}}
    _, deployment, facts = supposed(3, "h200", **wanted)
    cuda = facts.nodes[1].cuda.model_copy(update={"gpus": facts.nodes[1].cuda.gpus[:4]})
    uneven = Facts(nodes=(facts.nodes[0], facts.nodes[1].model_copy(update={"cuda": cuda}), facts.nodes[2]))
    model = models.built_in("meta-llama/Llama-3.1-8B", "0" * 40)
    assert model
    with pytest.raises(LayoutError, match="the same number of GPUs on every node, but nodes have 4 and 8"):
        plans.make(deployment, uneven, model)


# host memory


def test_weights_in_host_memory_are_not_ignored() -> None:
    """vLLM 0.26.0's second model runner takes --cpu-offload-gb and does nothing."""
    found = planned(1, repo="meta-llama/Llama-3.1-70B")
    assert found.layout.offload_gib > 40
    assert {node.env["VLLM_USE_V2_MODEL_RUNNER"] for node in found.nodes} == {"0"}
    assert found.serve_env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in planned(2, repo="meta-llama/Llama-3.1-70B").serve_env
    with pytest.raises(ConfigError, match=r"VLLM_USE_V2_MODEL_RUNNER = 1: with this setting, vllm 0.26.0 ignores the 5\d"):
        planned(1, repo="meta-llama/Llama-3.1-70B", env={"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert planned(1, env={"VLLM_USE_V2_MODEL_RUNNER": "1"}).head.env["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_the_version_in_the_lock_of_the_set_decides_what_weights_in_host_memory_need(tmp_path: Path) -> None:
    """Both model runners of vLLM 0.33.0 apply --cpu-offload-gb. An unknown version has what the version before it needs."""
    repo, newer = "meta-llama/Llama-3.1-70B", "gh200-cu130-torch2.14"
    found = planned(1, repo=repo, set=newer, env={"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert found.layout.offload_gib > 40
    assert "VLLM_USE_V2_MODEL_RUNNER" not in planned(1, repo=repo, set=newer).serve_env
    assert any("0.33.0 has not been run on a GPU" in note for note in found.notes)
    lock = tmp_path / "own.lock"
    lock.write_text(f"vllm==0.30.0 --hash=sha256:{'0' * 64}\n")
    between = planned(1, repo=repo, lock=str(lock))
    assert between.serve_env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert (
        "has vllm 0.30.0, which gracefarm does not know; gracefarm uses the options and environment variables of vllm 0.26.0"
        in str(between.notes)
    )


def test_where_host_and_gpu_share_a_memory_nothing_is_moved() -> None:
    with pytest.raises(LayoutError, match=r"131\.4 GiB of weights and requires 3 GiB"):
        planned(1, "gb10", "meta-llama/Llama-3.1-70B")
    with pytest.raises(LayoutError, match="share one memory, so 5 GiB of weights in host memory save nothing"):
        planned(1, "gb10", layout={"tensor_parallel": 1, "pipeline_parallel": 1, "cpu_offload_gib": 5})


# kinds of nodes


def test_kinds_are_found_by_what_people_type() -> None:
    assert hardware.named("GB200").gpus == 4
    assert {hardware.named(name).sm for name in ("b200", "gb10", "thor")} == {100, 121, 110}
    assert hardware.named("H200").name == "h200-141x8"
    for wrong, words in (
        ("GH200", "gh200-96 or gh200-144"),
        ("h20", "h200-141x8"),
        ("gb100", "gb10"),
        ("mi300", "known kinds: "),
    ):
        if wrong == "h20":
            assert hardware.named(wrong).name == words
            continue
        with pytest.raises(UsageError) as caught:
            hardware.named(wrong)
        assert words in caught.value.remedy


def test_a_drivers_name_finds_its_kind() -> None:
    names = {
        "NVIDIA GB200": "gb200",
        "NVIDIA B200": "b200",
        "NVIDIA GB10": "gb10",
        "NVIDIA Thor": "thor",
        "NVIDIA H200": "h200-141x8",
        "NVIDIA GH200 480GB": "gh200-96",
        "GH200 144G HBM3e": "gh200-144",
        "NVIDIA H100 80GB HBM3": "h100-80x8",
        "NVIDIA L4": "unknown",
    }
    assert {name: hardware.kind_of(name).name for name in names} == names


def test_every_price_has_a_date_and_a_source() -> None:
    priced = [kind for kind in hardware.kinds().values() if kind.price]
    assert len(priced) >= 4
    for kind in priced:
        assert kind.price
        assert kind.price.date.year >= 2026
        assert kind.price.source
        assert kind.price.usd < 15, "of a GPU, not of a node"


def test_gpus_that_differ_are_named() -> None:
    _, deployment, facts = supposed(2, repo="meta-llama/Llama-3.1-70B")
    gpu = facts.nodes[1].cuda.gpus[0].model_copy(update={"name": "NVIDIA H100 80GB HBM3", "total": 81559 << 20})
    cuda = facts.nodes[1].cuda.model_copy(update={"gpus": (gpu,)})
    mixed = Facts(nodes=(facts.nodes[0], facts.nodes[1].model_copy(update={"cuda": cuda})))
    model = models.built_in("meta-llama/Llama-3.1-70B", "0" * 40)
    assert model
    found = plans.make(deployment, mixed, model)
    assert any(
        note.startswith("the GPUs differ (GH200, NVIDIA H100 80GB HBM3): the smallest and the slowest") for note in found.notes
    )
    assert found.memory
    assert found.memory.budget_gib == pytest.approx(0.9 * 81559 / 1024, abs=0.01)


# models that the planner does not know


UNKNOWN = {"architectures": ["Qwen9NextForCausalLM"], "num_hidden_layers": 10}


def test_trust_serves_a_model_that_nobody_knows_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNKNOWN))
    model = '[model]\nrepo = "a/b"\nconfig = "config.json"\n'
    prepared(tmp_path, 'engine = "vllm"\n' + TOML + model)
    told(tmp_path, 64, "does not know the architecture Qwen9NextForCausalLM", "plan", "--nodes", "4")
    assert (
        "set trust = true, tensor_parallel and pipeline_parallel in [layout]"
        in deploy(tmp_path, "plan", "--nodes", "4").stderr
    )
    trusting = 'engine = "vllm"\n' + TOML + model + "[layout]\ntrust = true\n"
    (tmp_path / "deploy.toml").write_text(trusting)
    told(tmp_path, 3, "requires tensor_parallel and pipeline_parallel", "plan", "--nodes", "4")
    (tmp_path / "deploy.toml").write_text(trusting + "tensor_parallel = 2\npipeline_parallel = 4\n")
    told(tmp_path, 64, "tp2 pp4 requires 8 GPUs, but there are 4", "plan", "--nodes", "4")
    (tmp_path / "deploy.toml").write_text(trusting + "tensor_parallel = 2\npipeline_parallel = 2\n")
    done = deploy(tmp_path, "plan", "--nodes", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = ServePlan.model_validate_json(done.stdout.splitlines()[-1])
    assert (found.layout.name, found.memory, found.prediction) == ("tp2 pp2", None, None)
    assert "--max-model-len" not in found.serve
    assert "VLLM_PP_LAYER_PARTITION" not in found.head.env
    assert words_after(found.serve, "--tensor-parallel-size") == "2"
    assert any("without a prediction" in note for note in found.notes)
    replicas = "tensor_parallel = {}\npipeline_parallel = 1\ndata_parallel = {}\n"
    (tmp_path / "deploy.toml").write_text(trusting + replicas.format(2, 6))
    done = deploy(tmp_path, "plan", "--nodes", "2", "--gpu", "h200", "--json")
    uneven = ServePlan.model_validate_json(done.stdout.splitlines()[-1])
    assert ([node.gpus for node in uneven.nodes], uneven.serve_env["VLLM_RAY_DP_PACK_STRATEGY"]) == ([8, 4], "fill")
    (tmp_path / "deploy.toml").write_text(trusting + replicas.format(3, 2))
    told(tmp_path, 64, "a replica has 3 GPUs", "plan", "--nodes", "2", "--gpu", "h200")
    (tmp_path / "deploy.toml").write_text(trusting + "tensor_parallel = 2\npipeline_parallel = 2\n")
    shown = deploy(tmp_path, "plan", "--nodes", "4")
    assert (shown.returncode, "not predicted" in shown.stdout) == (0, True), shown.stderr


# the network


def node(name: str, *nics: Nic, rdma: tuple[Rdma, ...] = ()) -> NodeFacts:
    _, facts = suppose.suppose(hardware.named("gh200-96"), 1)
    return facts.nodes[0].model_copy(update={"name": name, "nics": nics, "rdma": rdma})


SLOW = Nic(name="eth0", mbit_s=1000, addresses=("10.0.0.1",))
FAST = Nic(name="ens5", mbit_s=100000, addresses=("10.1.0.1",))
BARE = Nic(name="ens6", mbit_s=100000)


def test_the_slowest_link_counts_and_a_faster_one_that_idles_is_named() -> None:
    assert links.link([node("k0", SLOW), node("k1", SLOW)]).gb_s == pytest.approx(0.1125)
    ten = Nic(name="eth0", mbit_s=10000, addresses=("10.0.0.1",))
    assert links.link([node("k0", SLOW), node("k1", ten)]).gb_s == pytest.approx(0.1125)
    assert links.link([node("k0"), node("k1", ten)]) == speed.Link()  # one does not say its speed
    port = Rdma(device="mlx5_0", gbit_s=400, link="InfiniBand")
    assert links.link([node("k0", SLOW, rdma=(port,)), node("k1", SLOW, rdma=(port,))]).text == "RDMA at 400 Gb/s"
    assert links.link([node("k0", SLOW, rdma=(port,)), node("k1", SLOW)]).gb_s == pytest.approx(0.1125)
    told_ = links.notes([node("k0", SLOW, FAST, BARE), node("k1", SLOW, FAST)])
    assert told_ == ["k0, k1: ens5 has 100 Gb/s, but eth0 with 1 Gb/s is used: set nic = 'ens5' in [nodes]"]
    assert links.notes([node("k0", SLOW, BARE), node("k1", FAST)]) == []


def test_a_faster_network_is_predicted_to_be_faster() -> None:
    _, deployment, facts = supposed(2, repo="meta-llama/Llama-3.1-70B", layout={"tensor_parallel": 2, "pipeline_parallel": 1})
    model = models.built_in("meta-llama/Llama-3.1-70B", "0" * 40)
    assert model
    port = Rdma(device="mlx5_0", gbit_s=400, link="InfiniBand")
    rates = []
    for change in ({"nics": (SLOW,)}, {}, {"rdma": (port,)}):
        nodes = tuple(each.model_copy(update=change) for each in facts.nodes)
        found = plans.make(deployment, Facts(nodes=nodes), model).prediction
        assert found
        rates.append(found.at(64))
    assert rates == sorted(rates)
    assert rates[0] < 0.2 * rates[2]


def test_a_node_says_the_speed_of_its_interfaces(tmp_path: Path) -> None:
    """Files as the kernel has them."""
    for name, text in (("eth0", "100000\n"), ("veth0", "-1\n"), ("odd", "fast\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(text)
    assert [network.speed(name, tmp_path) for name in ("eth0", "veth0", "odd", "none")] == [100000, None, None, None]
    for device, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / "ib" / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)\n"), ("link_layer", "InfiniBand\n")):
            (port / name).write_text(text)
    assert network.rdma(tmp_path / "ib") == [{"device": "mlx5_0", "gbit_s": 400.0, "link": "InfiniBand"}]
    assert network.rdma(tmp_path / "none") == []


def test_the_facts_have_them() -> None:
    """The interfaces of this very machine, as the worker says them."""
    found = network.interfaces()
    assert all({"name", "mbit_s", "mtu", "addresses"} <= set(interface) for interface in found)
    answer = {
        "interfaces": [{"name": "eth0", "mbit_s": 10, "mtu": 9000, "addresses": [{"address": "10.0.0.1", "prefix": 24}]}]
    }
    answer["interfaces"].append({"name": "docker0", "mbit_s": None, "mtu": 1500, "addresses": []})
    (nic,) = probe.joining(answer)
    assert Nic.model_validate(nic) == Nic(name="eth0", mbit_s=10, mtu=9000, addresses=("10.0.0.1",))
