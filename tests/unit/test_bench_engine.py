"""What the comparison of an engine with transformers accepts and refuses (bench/_serving/engine.py)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench._serving.engine import agrees, greedy_apart
from bench._serving.model import differences

STEPS = [{"7": -1.0, "8": -1.05, "9": -2.0}, {"3": -0.5, "4": -3.0}]
"Log-probabilities of the likeliest tokens in two steps."


def test_tokens_that_differ_at_a_near_tie_agree() -> None:
    assert greedy_apart([[8, 1]], [STEPS], 0.06) == {"same": 0, "of": 2, "ties": [0.05], "wrong": [], "near": 0.06}


@pytest.mark.parametrize(("token", "gap"), [(9, 1.0), (5, math.inf)])
def test_another_token_is_wrong(token: int, gap: float) -> None:
    assert greedy_apart([[token, 3]], [STEPS], 0.06)["wrong"] == [gap]


def test_the_same_tokens_are_counted() -> None:
    found = greedy_apart([[7, 3], [7, 4]], [STEPS, STEPS], 0.06)
    assert (found["same"], found["ties"], found["wrong"]) == (3, [], [2.5])


def test_no_common_tokens_are_no_agreement() -> None:
    assert differences([{"1": -1.0}], [{"2": -1.0}]) == {"mean": math.inf, "max": math.inf, "common": 0.0}


def reference() -> dict[str, Any]:
    half = {"mean": 0.01, "max": 0.03, "inside_mean": 0.01, "inside_max": 0.03}
    return {"half": half, "kept": [{"7": -1.0, "8": -1.05}], "inside": [[-4.0, -5.0]]}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"next": [{"7": -1.02, "8": -1.03}]}, True),
        ({"next": [{"7": -1.2, "8": -1.25}]}, False),
        ({"next": [{"7": -1.0, "6": -1.05}]}, False),
        ({"inside": [[-4.0, -5.2]]}, False),
        ({"greedy": [[9, 3]]}, False),
    ],
)
def test_each_measure_alone_refuses(change: dict[str, Any], holds: bool) -> None:
    ours = {"next": [{"7": -1.0, "8": -1.05}], "inside": [[-4.0, -5.0]], "greedy": [[7, 3]], **change}
    assert agrees(ours, reference(), [STEPS])[0] is holds
