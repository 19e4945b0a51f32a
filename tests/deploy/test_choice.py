"""Which layout is chosen: the fewest and cheapest nodes of those that are about equal, and one that the launcher can start."""

from __future__ import annotations

import dataclasses

import pytest

from deploy.planning import choosing, engines, hardware, models, placement, plans
from deploy.planning.layouts import Question
from deploy.planning.plans import ServePlan
from gracefarm.errors import LayoutError
from tests.deploy.test_plan import COMMIT, option, supposed
from tests.deploy.test_speed import planned


def test_of_layouts_that_are_about_equal_the_one_on_the_fewest_nodes_is_taken() -> None:
    found = planned(4, repo="Qwen/Qwen3-30B-A3B", layout={"objective": "throughput"})
    most = []
    for pp in (1, 2, 3, 4):
        prediction = planned(4, repo="Qwen/Qwen3-30B-A3B", layout={"tensor_parallel": 1, "pipeline_parallel": pp}).prediction
        assert prediction
        most.append(max(level.tokens_per_s for level in prediction.levels))
    assert most[1] < most[2] < most[1] / choosing.ABOUT
    assert most[2] < most[3] < most[2] / choosing.ABOUT
    assert most[0] < most[1] * choosing.ABOUT
    assert (found.layout.name, len(found.spares)) == ("tp1 pp2", 2)


def test_a_second_more_expensive_node_must_be_worth_it() -> None:
    """Once, a node with eight H100 was added to a GH200: 3 % faster, for ten times the price."""
    machines = [
        dataclasses.replace(placement.machines_of(hardware.named(kind), 1)[0], name=f"k{index}", private=f"10.0.0.{index + 1}")
        for index, kind in enumerate(("gh200-96", "h100-80x8"))
    ]
    model = models.built_in("Qwen/Qwen3-32B", "main")
    assert model
    prices = {"k0": 2.29, "k1": 22.32}
    question = Question(engine=engines.engine("vllm"), model=model, machines=tuple(machines), prices=prices)
    choice = choosing.choose(question)
    fastest = max(each.prediction.tokens_per_s for each in choice.others)
    assert choice.best.prediction.tokens_per_s < fastest * choosing.ABOUT  # the fastest one is not about equal
    assert (choice.best.nodes, choice.best.prediction.usd_per_hour) == (1, 2.29)
    rival = min((each for each in choice.others if each.nodes == 2), key=lambda each: -each.prediction.tokens_per_s)
    assert rival.prediction.usd_per_hour == 24.61


def small(count: int, kind: str, **layout: object) -> ServePlan:
    found = models.built_in("meta-llama/Llama-3.1-8B", COMMIT)
    assert found
    return plans.make(*supposed(count, kind, engine="vllm", launcher="native", layout=layout), found)


def test_without_ray_a_layout_is_chosen_that_starts_without_ray() -> None:
    """With Ray, four replicas on four nodes would be chosen."""
    for count, kind in ((4, "gh200-96"), (3, "h200-141x8")):
        found = small(count, kind, objective="throughput")
        assert len({node.gpus for node in found.nodes}) == 1
        assert found.layout.dp == 1 or len(found.nodes) == 1
    assert small(4, "gh200-96", objective="throughput").layout.dp == 1
    with pytest.raises(LayoutError, match="replicas on several nodes require Ray"):
        small(4, "gh200-96", data_parallel=4)
    with pytest.raises(LayoutError, match="same number of GPUs on all nodes"):
        small(2, "h200-141x8", tensor_parallel=4, pipeline_parallel=3)


def test_replicas_on_one_node_start_without_ray() -> None:
    found = small(1, "h200-141x8", tensor_parallel=1, pipeline_parallel=1, data_parallel=8)
    assert (option(found.serve, "--data-parallel-size"), option(found.serve, "--distributed-executor-backend")) == ("8", "mp")
    assert not {"--data-parallel-backend", "--nnodes"} & set(found.serve)
    assert not any("ray" in word.lower() for word in (*found.serve, *found.serve_env))
