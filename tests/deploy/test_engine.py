"""The engines' rules: which tp, which options, and where a model's numbers come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.nodes.config import ModelConfig
from deploy.planning import engines, models
from deploy.planning.engines import Split
from deploy.planning.shapes import Model
from deploy.rehearsal.hub import COMMIT, serving
from gracefarm.errors import ConfigError, FetchError

APHRODITE, VLLM = engines.engine("aphrodite"), engines.engine("vllm")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def big() -> Model:
    found = models.built_in("meta-llama/Llama-3.1-405B", "main")
    assert found
    return found


def test_aphrodite_takes_one_to_eight_and_says_why_no_more() -> None:
    assert engines.legal(APHRODITE, big(), 64) == tuple(range(1, 9))
    for tp in range(9, 16):
        assert "requires that tp is a multiple of this number" in str(engines.refusal(APHRODITE, big(), Split(tp=tp)))
    assert "no query heads" in str(engines.refusal(APHRODITE, big(), Split(tp=16)))


def test_uneven_shares_as_the_engine_deals_them() -> None:
    assert engines.kv_heads(APHRODITE, big(), 5) == (2, 2, 2, 1, 1)
    assert [engines.part(53248, rank, 5)[1] for rank in range(5)] == [10650, 10650, 10650, 10649, 10649]
    assert [engines.part(53248, rank, 5)[0] for rank in range(5)] == [0, 10650, 21300, 31950, 42599]
    assert engines.vocab(APHRODITE, big(), 5) == 128260
    assert engines.vocab(VLLM, big(), 8) == 128256


def test_the_engines_own_split_leaves_the_remainder_to_the_last_stage() -> None:
    assert engines.default_partition(126, 10) == (12,) * 9 + (18,)
    assert engines.default_partition(126, 4) == (31, 31, 31, 33)


@pytest.mark.parametrize(
    ("engine", "options", "arch", "words"),
    [
        (APHRODITE, {"max-parallel-loading-workers": 2}, "x86_64", "NotImplementedError"),
        (APHRODITE, {"api-keys": "x"}, "x86_64", "can read keys in arguments"),
        (VLLM, {"api_key": "x"}, "x86_64", "can read keys in arguments"),
        (APHRODITE, {"tensor-parallel-size": 2}, "x86_64", r"set tensor_parallel in \[layout\]"),
        (APHRODITE, {"tp": 2}, "x86_64", r"set tensor_parallel in \[layout\]"),
        (APHRODITE, {"host": "0.0.0.0"}, "x86_64", "127.0.0.1"),
        (APHRODITE, {"kv-cache-dtype": "fp8"}, "aarch64", "xformers"),
        (APHRODITE, {"kv_cache_dtype": "fp8_e5m2"}, "aarch64", "xformers"),
        (APHRODITE, {"block-size": 8}, "aarch64", "xformers"),
        (APHRODITE, {"quantization": "fp8"}, "x86_64", "in the model's config.json"),
    ],
)
def test_options_that_are_ours_secret_or_broken_are_refused(
    engine: engines.Engine, options: dict[str, engines.GivenValue], arch: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        engines.check(engine, options, arch)


def test_fp8_cache_is_for_machines_that_have_xformers() -> None:
    engines.check(APHRODITE, {"kv-cache-dtype": "fp8", "max-log-len": 0}, "x86_64")
    engines.check(APHRODITE, {"kv-cache-dtype": "auto", "block-size": 32}, "aarch64")


def test_options_become_arguments_as_each_engine_spells_them() -> None:
    given: dict[str, engines.GivenValue] = {"uvloop": True, "disable-log-requests": False, "enforce_eager": True, "seed": 7}
    assert engines.arguments(APHRODITE, given) == ["--uvloop", "--enforce-eager", "true", "--seed", "7"]
    assert engines.arguments(APHRODITE, {"middleware": ["a", "b"]}) == ["--middleware", "a", "--middleware", "b"]
    assert engines.arguments(VLLM, {"enforce-eager": False, "x": ["a", "b"]}) == ["--no-enforce-eager", "--x", "a", "b"]
    with pytest.raises(ConfigError, match="no option --max-log-length"):
        engines.validate(APHRODITE, engines.arguments(APHRODITE, {"max-log-length": 0}))


def test_a_config_of_an_unknown_shape_or_quantisation_is_no_plan() -> None:
    for changes, words in (
        ({"architectures": ["Qwen9ForCausalLM"]}, "does not know the architecture Qwen9ForCausalLM"),
        ({"quantization_config": {"quant_method": "turbo"}}, "the quantisation turbo of the weights"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8"}},
            "the quantisation modelopt W4A8 of the weights",
        ),
    ):
        with pytest.raises(models.UnknownModelError, match=words):
            models.from_config({**CONFIG, **changes}, repo="a/b", revision="main", source="test")
    with pytest.raises(ConfigError, match="no intermediate_size"):
        models.from_config(
            {key: value for key, value in CONFIG.items() if key != "intermediate_size"}, repo="a/b", revision="m", source="t"
        )
    with pytest.raises(ConfigError, match="wrong"):
        models.from_config({**CONFIG, "hidden_size": "x"}, repo="a/b", revision="main", source="test")


def test_a_local_config_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found, note = models.find(ModelConfig(repo="a/b", config="config.json"), tmp_path)
    assert (found.kv_heads, found.tied, found.head_dim, note) == (4, True, 8, "")
    with pytest.raises(ConfigError, match="no such file"):
        models.find(ModelConfig(repo="a/b", config="other.json"), tmp_path)


def test_the_hub_resolves_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"config.json": json.dumps(CONFIG).encode()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found, note = models.find(ModelConfig(repo="org/model"), tmp_path)
        assert (found.revision, found.layers, note) == (COMMIT, 4, "")
        with pytest.raises(FetchError, match="no org/other at revision main"):
            models.find(ModelConfig(repo="org/other"), tmp_path)


def test_a_gated_model_is_planned_with_the_built_in_numbers_and_an_unknown_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving({"config.json": b"{}"}, gated=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(FetchError, match="gated or private") as caught:
            models.find(ModelConfig(repo="org/model"), tmp_path)
        assert "HF_TOKEN" in caught.value.remedy
        monkeypatch.setattr(models, "built_in_models", lambda: [{**CONFIG, "names": ["org/model"]}])
        found, note = models.find(ModelConfig(repo="org/model"), tmp_path)
        assert (found.layers, found.revision) == (4, COMMIT)  # the commit is not secret
        assert "gated or private" in note
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found, note = models.find(ModelConfig(), tmp_path)
    assert found.layers == 126
    assert "cannot be reached" in note
    assert not found.pinned
