"""Replicas of models with experts: memory against calculations written out here, vLLM's rules, commands, speed, choices."""

from __future__ import annotations

import re

import pytest

from deploy.cli import plan_text
from deploy.nodes.config import LayoutConfig
from deploy.planning import choosing, engines, hardware, layouts, models, placement, shards, speed
from deploy.planning.engines import Split
from deploy.planning.layouts import Candidate, Question
from deploy.planning.shapes import Model
from deploy.planning.speed import Link
from gracefarm.errors import LayoutError
from tests.deploy.test_speed import planned, words_after

GIB = 1 << 30
BF16 = 2
MIXTRAL, QWEN, DEEPSEEK = "mistralai/Mixtral-8x22B-v0.1", "Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V3"
SMALL, OSS, KIMI = "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-120b", "moonshotai/Kimi-K2.5"
FAST = speed.rdma(400)


def known(repo: str) -> Model:
    model = models.built_in(repo, "main")
    assert model
    return model


def asked(repo: str, gpu: str, nodes: int, link: Link | None = None, **forced: object) -> Question:
    return Question(
        engine=engines.engine("vllm"),
        model=known(repo),
        machines=placement.machines_of(hardware.named(gpu), nodes),
        forced=LayoutConfig.model_validate(forced),
        link=link or Link(),
    )


def evaluated(repo: str, gpu: str, nodes: int, tp: int, dp: int, *, whole: bool | None = None, pp: int = 1) -> Candidate:
    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "data_parallel": dp, "expert_parallel": whole}
    return choosing.choose(asked(repo, gpu, nodes, **{name: size for name, size in sizes.items() if size is not None})).best


# memory


def mixtral(parts: int) -> int:
    """tp1: attention, router, norms and both tables whole on every rank; 8 experts of three matrices in `parts` parts."""
    attention = 6144 * 48 * 128 * 2 + 6144 * 8 * 128 * 2
    experts = 8 * 3 * 6144 * 16384 // parts
    return BF16 * (56 * (attention + experts + 8 * 6144 + 2 * 6144) + 2 * 32000 * 6144 + 6144)


def qwen(experts: int, columns: int) -> int:
    """tp1 with this number of experts on a rank, of this number of columns."""
    attention = 4096 * 64 * 128 * 2 + 4096 * 4 * 128 * 2 + 2 * 128
    return BF16 * (94 * (attention + experts * 3 * 4096 * columns + 128 * 4096 + 2 * 4096) + 2 * 151936 * 4096 + 4096)


@pytest.mark.parametrize(
    ("repo", "gpu", "nodes", "dp", "whole", "weights"),
    [
        (MIXTRAL, "gh200-144", 2, 2, False, mixtral(2)),
        (MIXTRAL, "gh200-96", 4, 4, False, mixtral(4)),
        (MIXTRAL, "gh200-96", 4, 4, True, mixtral(4)),  # two of eight experts: the same bytes
        (QWEN, "h200", 1, 4, False, qwen(128, 384)),
        (QWEN, "h200", 1, 4, True, qwen(32, 1536)),
        (QWEN, "gh200-96", 8, 8, True, qwen(16, 1536)),
    ],
)
def test_experts_are_divided_among_all_replicas_and_the_rest_is_whole_in_each(
    repo: str, gpu: str, nodes: int, dp: int, whole: bool, weights: int
) -> None:
    found = evaluated(repo, gpu, nodes, 1, dp, whole=whole)
    assert found.memory.by_stage_gib == ((round(weights / GIB, 3),),)
    assert (found.layout.dp, found.layout.expert_parallel) == (dp, whole)


def test_a_replica_has_a_cache_for_its_own_requests_and_buffers_for_the_tokens_of_all() -> None:
    found = evaluated(MIXTRAL, "gh200-96", 4, 1, 4)
    # Of each token of the three other replicas: its input, and for each of its 2 experts the output (6144) and both halves
    # of its part of the columns (2 * 4096).
    buffers = BF16 * 3 * 2048 * (6144 + 2 * (6144 + 8192))
    assert found.memory.reserve_gib == round(3 + buffers / GIB, 2)
    room = int((97871 << 20) * 0.9) - mixtral(4) - 3 * GIB - buffers
    token = 2 * 56 * 8 * 128 * BF16
    assert found.memory.request_tokens == room // token // 16 * 16
    assert found.memory.cache_tokens == 4 * found.memory.request_tokens
    whole = evaluated(MIXTRAL, "gh200-96", 4, 1, 4, whole=True)
    assert whole.memory.reserve_gib == round(3 + BF16 * 3 * 2048 * (6144 + 2 * (16384 + 32768)) / GIB, 2)
    assert evaluated(MIXTRAL, "gh200-96", 4, 4, 1).memory.reserve_gib == 3


def test_ranks_of_replicas_with_whole_experts_hold_the_shared_experts_whole() -> None:
    """tp2 dp4 of DeepSeek-V3: these ranks divide the tokens, not the columns of the shared experts."""
    layers = 58  # with experts; a matrix of 7168 x 2048 in 8 bit has 56 x 16 scales of 4 bytes
    matrices = 3 * (7168 * 2048 + 4 * 56 * 16)
    whole, split = (evaluated(DEEPSEEK, "h200", 1, 2, 4, whole=word) for word in (True, False))
    more = (whole.memory.weights_gib - split.memory.weights_gib) * GIB
    assert more == pytest.approx(layers * matrices / 2, abs=0.002 * GIB)
    alone = evaluated(DEEPSEEK, "h200", 1, 8, 1, whole=True)  # one replica: divided into eight parts as before
    of_all = shards.shares(engines.engine("vllm"), known(DEEPSEEK), Split(tp=8), (61,))[0][0].weights
    assert alone.memory.weights_gib == round(of_all / GIB, 3)


def test_leftover_experts_are_on_the_first_ranks() -> None:
    """128 experts on three ranks: 43, 43 and 42. The planner computes with the fullest rank."""
    question = asked(SMALL, "h200", 1)
    split = Split(tp=1, dp=3, expert_parallel=True)
    expert = 48 * 3 * 2048 * 768 * BF16
    held = layouts.ranks_of(question, split, (48,), 3)
    assert [share.experts for share in held] == [43 * expert, 43 * expert, 42 * expert]
    pairs = layouts.ranks_of(question, Split(tp=2, dp=3, expert_parallel=True), (48,), 3)
    assert [share.experts // expert for share in pairs] == [22, 22, 21, 21, 21, 21]
    assert sum(share.experts for share in pairs) == 128 * expert


@pytest.mark.parametrize("repo", [MIXTRAL, QWEN, DEEPSEEK, KIMI])
@pytest.mark.parametrize(("tp", "dp"), [(1, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("whole", [False, True])
def test_all_replicas_together_hold_every_expert_once(repo: str, tp: int, dp: int, whole: bool) -> None:
    question = asked(repo, "h200", 1)
    split = Split(tp=tp, dp=dp, expert_parallel=whole)
    held = layouts.ranks_of(question, split, (question.model.layers,), dp)
    alone = layouts.ranks_of(question, Split(tp=1), (question.model.layers,), 1)[0]
    assert len(held) == tp * dp
    copies = 8 * 2 * 3 * 384 * 60 * (tp * dp - 1) if repo == KIMI and not whole else 0  # each part has the matrix's shape
    assert sum(share.experts for share in held) == alone.experts + copies
    assert {share.token for share in held} == {alone.token if known(repo).latent else alone.token // tp}


def test_a_part_of_mxfp4_experts_is_padded_after_all_replicas_have_divided_it() -> None:
    """gpt-oss-120b on Hopper, tp1 dp4: 720 columns of each of 128 experts, padded to 768; 4 bits a weight, 8 for each 32."""
    (held, *_) = layouts.ranks_of(asked(OSS, "h200", 1), Split(tp=1, dp=4, expert_multiple=64), (36,), 4)
    weights = 3 * 2880 * 768 // 2 + 3 * 2880 * 768 // 32
    assert held.experts == 36 * 128 * (weights + BF16 * (2 * 768 + 2880))


# vLLM's rules


@pytest.mark.parametrize(
    ("repo", "tp", "dp", "forced", "reason"),
    [
        (QWEN, 1, 5, False, "tp 1 dp 5: vllm splits evenly, but 1536 columns of an expert are not divisible by 5"),
        ("Qwen/Qwen3-235B-A22B-FP8", 1, 8, False, "tp 1 dp 8: .* the 192 columns of an expert on each rank .* by 128"),
        ("Qwen/Qwen3-235B-A22B-FP8", 2, 4, False, "tp 2 dp 4: .* the 192 columns of an expert on each rank .* by 128"),
        (MIXTRAL, 1, 16, True, "tp 1 dp 16: with 8 experts, some of the 16 ranks would have no expert, and deploy does not"),
        (OSS, 1, 3, True, "tp 1 dp 3: vllm requires that the 128 experts are divisible by 3 ranks"),
        (OSS, 1, 7, None, "tp 1 dp 7: vllm splits evenly, but 2880 columns of an expert are not divisible by 7"),
    ],
)
def test_what_vllm_refuses_is_refused_with_its_rule(repo: str, tp: int, dp: int, forced: bool | None, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason) as refused:
        evaluated(repo, "h200", 2, tp, dp, whole=forced)
    ways = re.findall(r"set (\w+) in \[layout\] to (?:one of: )?([\w, ]+?)(?=, or |$)", refused.value.remedy)
    assert ways
    for key, values in ways:
        for value in values.split(", "):
            sizes = {"tensor_parallel": tp, "data_parallel": dp, "expert_parallel": forced} | {key: value}
            question = asked(repo, "h200", 2, expert_parallel=sizes["expert_parallel"])
            split = layouts.split_of(question, int(str(sizes["tensor_parallel"])), int(str(sizes["data_parallel"])))
            assert engines.refusal(question.engine, question.model, split) is None, (key, value)


def test_the_remedy_does_not_offer_the_value_that_was_refused_or_more_gpus_than_there_are() -> None:
    fp8 = "Qwen/Qwen3-235B-A22B-FP8"
    with pytest.raises(LayoutError, match="192 columns of an expert on each rank") as refused:
        choosing.choose(asked(fp8, "h200", 2, tensor_parallel=8, expert_parallel=False))
    assert refused.value.remedy == (
        "set tensor_parallel in [layout] to one of: 1, 2, 4, or set expert_parallel in [layout] to true"
    )
    with pytest.raises(LayoutError, match="64 attention heads are not divisible by 3") as refused:
        choosing.choose(asked(fp8, "h200", 1, tensor_parallel=3, pipeline_parallel=2))
    assert refused.value.remedy == "set tensor_parallel in [layout] to one of: 1, 2, 4"


def test_a_number_of_replicas_alone_is_refused_with_its_reason() -> None:
    fp8 = "Qwen/Qwen3-235B-A22B-FP8"
    with pytest.raises(
        LayoutError, match="tp 1 dp 9: vllm splits evenly, but 1536 columns of an expert are not divisible by 9"
    ):
        choosing.choose(asked(fp8, "h200", 2, data_parallel=9, expert_parallel=False))
    with pytest.raises(LayoutError, match=r"^dp20 requires at least 20 GPUs, but there are 16$"):
        choosing.choose(asked("Qwen/Qwen3-32B", "h200", 2, data_parallel=20))
    assert choosing.choose(asked(fp8, "h200", 2, data_parallel=9)).best.layout.dp == 9


def test_whole_experts_of_a_model_without_experts_are_refused() -> None:
    for forced in ({}, {"tensor_parallel": 2, "pipeline_parallel": 1}):
        with pytest.raises(LayoutError, match=r"expert_parallel is true in .*, but Qwen/Qwen3-32B has no experts"):
            choosing.choose(asked("Qwen/Qwen3-32B", "h200", 1, expert_parallel=True, **forced))
    assert choosing.choose(asked("Qwen/Qwen3-32B", "h200", 1, expert_parallel=False)).best


def test_experts_stay_whole_where_replicas_cannot_divide_them() -> None:
    assert evaluated("Qwen/Qwen3-235B-A22B-FP8", "h200", 1, 1, 8).layout.expert_parallel
    assert not evaluated("Qwen/Qwen3-235B-A22B-FP8", "h200", 1, 1, 4).layout.expert_parallel
    assert evaluated(QWEN, "h200", 1, 1, 5).layout.expert_parallel


def test_gpt_oss_requires_that_all_gpus_divide_the_columns_of_an_expert() -> None:
    """An assertion in gpt_oss.py, which counts the ranks of all stages and replicas."""
    with pytest.raises(LayoutError, match=r"tp 1 pp 7: vllm requires that the 2880 columns of an expert are .* which is 7"):
        evaluated(OSS, "h200", 1, 1, 1, pp=7)
    with pytest.raises(LayoutError, match=r"tp 1 dp 2 pp 7: .* which is 14"):
        evaluated(OSS, "h200", 2, 1, 2, pp=7)
    assert evaluated(OSS, "h200", 2, 1, 2, pp=8).layout.world == 16


# commands


def test_the_command_has_replicas_and_whole_experts() -> None:
    layout = {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 8}
    apart = planned(2, "h200", SMALL, layout=layout | {"data_parallel": 16})
    assert words_after(apart.serve, "--data-parallel-size") == "16"
    assert words_after(apart.serve, "--data-parallel-size-local") == "8"
    assert words_after(apart.serve, "--data-parallel-backend") == "ray"
    assert "--enable-expert-parallel" not in apart.serve
    whole = planned(1, "h200", SMALL, layout=layout | {"expert_parallel": True})
    assert "--enable-expert-parallel" in whole.serve
    assert whole.layout.name == "tp1 pp1 dp8 ep"
    across = planned(4, repo=QWEN, layout={"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 2})
    assert across.serve_env["VLLM_RAY_DP_PACK_STRATEGY"] == "span"
    with pytest.raises(LayoutError, match="replicas on several nodes require Ray"):
        planned(2, "h200", SMALL, launcher="native", layout=layout | {"data_parallel": 16})


def test_the_last_node_may_have_fewer_replicas() -> None:
    """vLLM's default packing skips a node with fewer free GPUs than the head's replicas need, so it must fill the nodes."""
    for tp, dp, local, gpus in ((2, 6, "4", [8, 4]), (1, 12, "8", [8, 4]), (1, 9, "8", [8, 1])):
        found = planned(2, "h200", layout={"tensor_parallel": tp, "pipeline_parallel": 1, "data_parallel": dp})
        assert words_after(found.serve, "--data-parallel-size-local") == local
        assert found.serve_env["VLLM_RAY_DP_PACK_STRATEGY"] == "fill"
        assert [node.gpus for node in found.nodes] == gpus
        assert [words_after(node.ray, "--num-gpus") for node in found.nodes] == [str(count) for count in gpus]
    few = planned(2, "h200", layout={"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 3})
    assert (len(few.nodes), words_after(few.serve, "--data-parallel-size-local")) == (1, "3")
    assert "VLLM_RAY_DP_PACK_STRATEGY" not in few.serve_env


# speed


def test_replicas_exchange_the_tokens_of_all_once_in_each_layer_with_experts() -> None:
    """16 streams on four replicas of one GH200 each over TCP, worked out by hand for Mixtral 8x22B."""
    found = evaluated(MIXTRAL, "gh200-96", 4, 1, 4)
    tokens = 16  # four of each replica, hidden size 6144 in 16 bit
    exchange = 20e-6 + 2 * 3 * 34e-6 + 2 * 3 / 4 * (2 * 6144 * tokens) / 2.35e9
    needed = 1 - (1 - 2 / 8) ** tokens
    attention = 6144 * 48 * 128 * 2 + 6144 * 8 * 128 * 2
    read = BF16 * (56 * (attention + 8 * 6144 + 2 * 6144) + 32000 * 6144 + 6144)
    experts = BF16 * 56 * 8 * 3 * 6144 * 16384 / 4
    cache = 4 * 512 * 2 * 56 * 8 * 128 * BF16
    reading = (read + experts * needed + cache) / (4e12 * 0.89)
    step = reading + 56 * (35e-6 + 15e-6 + exchange) + 3 * 24e-6
    level = next(level for level in found.prediction.levels if level.streams == tokens)
    assert level.tokens_per_s == pytest.approx(tokens / step, rel=0.001)
    # One stream: the other replicas compute an empty step, so four tokens are exchanged.
    alone = 56 * (20e-6 + 6 * 34e-6 + 1.5 * (2 * 6144 * 4) / 2.35e9)
    assert found.prediction.collectives_ms == round(alone * 1e3, 1)


def test_the_exchange_within_a_node_costs_an_all_reduce_and_with_tp_includes_all_ranks() -> None:
    inside = evaluated(MIXTRAL, "h200", 1, 1, 8)
    assert inside.prediction.collectives_ms == round(56 * 20e-6 * 1e3, 1)
    across, whole = (evaluated(QWEN, "gh200-96", 8, 2, 4, whole=word) for word in (False, True))
    each, message = 20e-6 + 2 * 34e-6 + 2 * 4096 / 2.35e9, 2 * 4096 * 4 / 2.35e9  # the two all-reduces of tp2, and the tokens
    for layout, ranks in ((across, 4), (whole, 8)):
        exchange = 20e-6 + 2 * (ranks - 1) * 34e-6 + 2 * (ranks - 1) / ranks * message
        assert layout.prediction.collectives_ms == round(94 * (2 * each + exchange) * 1e3, 1)


@pytest.mark.parametrize(
    ("repo", "gpu", "nodes", "tp", "dp", "whole", "ranks", "groups"),
    [
        (DEEPSEEK, "h200", 2, 8, 2, False, 2, 8),  # eight pairs, each across the two nodes
        (DEEPSEEK, "h200", 2, 8, 2, True, 16, 1),
        (DEEPSEEK, "h200", 2, 4, 4, False, 4, 4),
        (MIXTRAL, "h200", 2, 2, 4, False, 4, 1),  # on one node
        (MIXTRAL, "gh200-96", 8, 2, 4, False, 4, 1),  # a node has one rank
        (MIXTRAL, "gh200-96", 8, 2, 4, True, 4, 1),  # Mixtral's ranks do not divide the tokens
        (QWEN, "gh200-96", 8, 2, 4, True, 8, 1),
    ],
)
def test_groups_that_exchange_at_the_same_time_share_the_link_of_a_node(
    repo: str, gpu: str, nodes: int, tp: int, dp: int, whole: bool, ranks: int, groups: int
) -> None:
    question = asked(repo, gpu, nodes)
    found = evaluated(repo, gpu, nodes, tp, dp, whole=whole)
    split = layouts.split_of(asked(repo, gpu, nodes, expert_parallel=whole), tp, dp)
    held = layouts.ranks_of(question, split, found.layout.partition, dp)
    (stage,) = layouts.stage_loads(question, found.layout, found.slots, held)
    assert (stage.exchange_ranks, stage.exchange_groups) == (ranks, groups)
    layers = stage.exchanges
    size = groups * 2 * question.model.hidden * dp
    each = 20e-6 + 2 * (ranks - 1) * 34e-6 + 2 * (ranks - 1) / ranks * size / 2.35e9
    inside = found.nodes == 1
    assert found.prediction.exchange_ms == round(layers * (20e-6 if inside else each) * 1e3, 1)


# choices


def test_throughput_and_cost_choose_replicas_that_are_predicted_to_be_better_and_speed_does_not() -> None:
    speedy, wide, cheap = (
        choosing.choose(asked(QWEN, "gh200-96", 10, FAST, objective=word)).best for word in ("speed", "throughput", "cost")
    )
    assert (speedy.layout.dp, wide.layout.dp, cheap.layout.dp) == (1, 8, 8)
    most = [max(level.tokens_per_s for level in each.prediction.levels) for each in (speedy, wide)]
    assert most[1] > 1.5 * most[0]
    inside = choosing.choose(asked(MIXTRAL, "h200", 1, objective="throughput")).best
    assert (inside.layout.name, inside.nodes) == ("tp1 pp1 dp8", 1)
    tried = choosing.choose(asked(MIXTRAL, "h200", 1))
    assert {each.layout.dp for each in (tried.best, *tried.others)} == {1}


def test_a_number_of_replicas_that_is_refused_does_not_end_the_search() -> None:
    """With 10 GPUs, 5, 7, 9 and 10 replicas of one GPU cannot divide 1536 columns; they get whole experts."""
    choice = choosing.choose(asked(QWEN, "gh200-96", 10, FAST, objective="throughput"))
    assert {each.layout.dp for each in (choice.best, *choice.others)} > {1, 2, 5, 8, 10}
    forced = {"objective": "throughput", "expert_parallel": False, "tensor_parallel": 1}
    few = choosing.choose(asked(QWEN, "gh200-96", 10, FAST, **forced))
    assert few.best.layout.dp == 8
    assert {each.layout.dp for each in (few.best, *few.others)} == {1, 2, 3, 4, 6, 8}
    assert not [each.layout for each in few.rejected if "dp" in each.layout]


def test_reasons_do_not_repeat_the_sizes_of_their_layout() -> None:
    rejected = choosing.choose(asked(OSS, "h200", 1, FAST, objective="throughput")).rejected
    reasons = {each.layout: each.reason for each in rejected}
    assert reasons["tp3"] == reasons["tp7"] == "vllm splits evenly, but 64 attention heads are not divisible by tp"
    forced = choosing.choose(asked(OSS, "h200", 1, tensor_parallel=1, data_parallel=1)).rejected
    assert {each.layout: each.reason for each in forced}["tp1 pp7"].startswith("vllm requires that the 2880 columns")


def test_the_search_keeps_replicas_equal_on_all_nodes() -> None:
    """Eight of 16 GPUs are on each node: 12 replicas would be eight and four, which only deploy.toml can choose."""
    choice = choosing.choose(
        asked(MIXTRAL, "h200", 2, FAST, objective="throughput", tensor_parallel=1, pipeline_parallel=None)
    )
    found = {each.layout.dp for each in (choice.best, *choice.others) if each.layout.pp == 1}
    assert {8, 16} <= found
    assert not found & set(range(9, 16))
    assert evaluated(QWEN, "h200", 2, 1, 12, whole=False).nodes == 2


def test_nodes_that_replicas_over_a_slow_network_do_not_use_can_serve_another_deployment() -> None:
    moe = planned(2, "h200", MIXTRAL, layout={"objective": "throughput"})
    assert (moe.layout.name, moe.spares) == ("tp1 pp1 dp8", ("k1",))
    (note,) = (note for note in moe.notes if "not used" in note)
    assert note.endswith("would not be noticeably faster")
    assert moe.prediction
    both = f"{2 * moe.prediction.levels[-1].tokens_per_s:,.0f} tokens/s together"
    assert any(
        f"2 separate deployments of tp1 pp1 dp8 on 1 node each would serve more: they are predicted to reach {both}" in note
        for note in moe.notes
    )


@pytest.mark.parametrize("layout", [{"data_parallel": 1}, {"pipeline_parallel": 10, "tensor_parallel": 8}, {}])
def test_separate_deployments_are_named_with_their_figure_where_they_serve_more(layout: dict[str, int]) -> None:
    found = planned(16, "h200", QWEN, layout={"objective": "throughput", **layout})
    told = [note for note in found.notes if "separate deployments" in note]
    if "pipeline_parallel" in layout:
        assert told == []  # one layout was asked for, and all nodes but six serve it
        return
    (note,) = told
    figures = re.findall(r"([\d,]+) tokens/s", note)
    together, alone = (int(figure.replace(",", "")) for figure in figures)
    assert together > alone / choosing.ABOUT
    speedy = planned(16, "h200", QWEN, layout={"objective": "speed", **layout})
    assert not any("separate deployments" in note for note in speedy.notes)


# what the plan says


def test_the_plan_says_which_numbers_are_of_all_replicas_and_that_the_speed_is_not_calibrated() -> None:
    layout = {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 8, "max_num_seqs": 32}
    found = planned(1, "h200", MIXTRAL, layout=layout)
    said = " ".join(plan_text.text(found, commands=False).split())
    assert "; at most 256 (32 per replica) at the same time, " in said
    assert "Nodes of the first of 8 replicas. KV cache: " in said
    assert found.prediction
    assert found.prediction.exchange_ms == found.prediction.collectives_ms == 1.1
    assert "all-reduces 0 ms, exchange of tokens between replicas 1.1 ms" in said
    assert "the predicted speed of replicas that share experts is not calibrated" in said
    one = planned(1, "h200", MIXTRAL, layout=layout | {"data_parallel": 1, "tensor_parallel": 8})
    said = " ".join(plan_text.text(one, commands=False).split())
    assert "; at most 32 at the same time, " in said
    for absent in ("replica", "exchange of tokens", "not calibrated"):
        assert absent not in said
    dense = planned(1, "h200", layout=layout)
    assert not any("calibrated" in note for note in dense.notes)
