"""What a rank holds of the models of today, against calculations written out here: no function of the planner is in them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from deploy.nodes.config import LayoutConfig
from deploy.planning import choosing, engines, hardware, layouts, models, placement
from deploy.planning.layouts import Candidate, Question
from gracefarm.errors import LayoutError

GIB = 1 << 30
BF16 = 2


def planned(repo: str, gpu: str, nodes: int, tp: int, pp: int, **forced: object) -> Candidate:
    model = models.built_in(repo, "main")
    assert model
    question = Question(
        engine=engines.engine("vllm"),
        model=model,
        machines=placement.machines_of(hardware.named(gpu), nodes),
        forced=LayoutConfig.model_validate({"tensor_parallel": tp, "pipeline_parallel": pp, **forced}),
    )
    return choosing.choose(question).best


def eighths(columns: int) -> int:
    """Blocks of 128."""
    assert columns % 128 == 0
    return columns // 128


def llama_405b() -> int:
    """Rank 0 of stage 0 of tp8 pp2: 63 layers and the embedding, everything but the norms in eight parts."""
    attention = 16384 * 16 * 128 * 2 + 16384 * 1 * 128 * 2  # 16 query heads and 1 KV head: q and o, k and v
    mlp = 3 * 16384 * 6656
    return BF16 * (63 * (attention + mlp + 2 * 16384) + 128256 // 8 * 16384)


def llama_405b_fp8() -> int:
    """tp8 pp1, one byte a weight and four for each row of a matrix; o and down keep the rows of all ranks."""
    weights = 16384 * 16 * 128 * 2 + 16384 * 128 * 2 + 3 * 16384 * 6656
    rows = 16 * 128 + 2 * 128 + 16384 + 2 * 6656 + 16384
    return 126 * (weights + 4 * rows + BF16 * 2 * 16384) + BF16 * (2 * 128256 // 8 * 16384 + 16384)


def llama_70b() -> int:
    """tp2 pp1."""
    layer = 8192 * 32 * 128 * 2 + 8192 * 4 * 128 * 2 + 3 * 8192 * 14336 + 2 * 8192
    return BF16 * (80 * layer + 2 * 128256 // 2 * 8192 + 8192)


def qwen3_235b() -> int:
    """tp4 pp1: 16 query heads, one KV head, a quarter of each of 128 experts; router and norms whole."""
    attention = 4096 * 16 * 128 * 2 + 4096 * 128 * 2 + 2 * 128
    experts = 128 * 3 * 4096 * 384
    return BF16 * (94 * (attention + experts + 128 * 4096 + 2 * 4096) + 2 * 151936 // 4 * 4096 + 4096)


def qwen3_235b_fp8() -> int:
    """tp4 pp1, a scale of four bytes for each block of 128 x 128."""
    attention = 4096 * 16 * 128 * 2 + 4096 * 128 * 2
    scales = 32 * 16 * 2 + 32 * 1 * 2
    expert = 3 * 4096 * 384
    layer = attention + 4 * scales + 128 * (expert + 4 * 3 * 32 * 3)
    return 94 * (layer + BF16 * (2 * 128 + 128 * 4096 + 2 * 4096)) + BF16 * (2 * 151936 // 4 * 4096 + 4096)


def mixtral_8x22b() -> int:
    """tp8 pp1: six query heads, one KV head, an eighth of each of 8 experts."""
    attention = 6144 * 6 * 128 * 2 + 6144 * 128 * 2
    return BF16 * (56 * (attention + 8 * 3 * 6144 * 2048 + 8 * 6144 + 2 * 6144) + 2 * 32000 // 8 * 6144 + 6144)


def deepseek_v3() -> int:
    """tp8 pp2, stage 0: the embedding, 3 dense layers, then layers with experts. q_a and kv_a are whole on every rank."""
    heads = 16
    down = 7168 * 1536 + 7168 * (512 + 64)
    up = 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * 7168
    scales = 56 * 12 + 56 * 5 + 12 * (heads * 192 // 128) + 4 * (heads * 256 // 128) + heads * 56
    absorbed = BF16 * heads * 256 * 512  # kv_b once more in 16 bit, for decoding
    norms = BF16 * (1536 + 512 + 2 * 7168)
    attention = down + up + 4 * scales + absorbed + norms
    dense = 3 * 7168 * 2304 + 4 * 3 * 56 * eighths(2304)
    experts = 256 * (3 * 7168 * 256 + 4 * 3 * 56 * 2) + 3 * 7168 * 256 + 4 * 3 * 56 * 2
    router = BF16 * 256 * 7168 + 4 * 256
    layers = planned("deepseek-ai/DeepSeek-V3", "h200", 2, 8, 2).layout.partition[0]
    return layers * attention + 3 * dense + (layers - 3) * (experts + router) + BF16 * 129280 // 8 * 7168


def deepseek_v32() -> int:
    """tp8 pp2, stage 0: V3 with an indexer of 64 heads in every layer, whole on every rank, its keys in 16 bit."""
    indexer = 1536 * 64 * 128 + 4 * 12 * 64 + BF16 * (7168 * 128 + 64 * 7168 + 2 * 128) + 4 * 56
    layers = planned("deepseek-ai/DeepSeek-V3.2", "h200", 2, 8, 2).layout.partition[0]
    assert layers == planned("deepseek-ai/DeepSeek-V3", "h200", 2, 8, 2).layout.partition[0]
    return deepseek_v3() + layers * indexer


def kimi_k2_int4() -> int:
    """tp8 pp2, stage 0: one dense layer in 16 bit, then 384 experts in 4 bit with a scale for each 32 weights."""
    heads = 8
    attention = 7168 * 1536 + 7168 * 576 + 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * 7168
    absorbed = heads * 256 * 512
    norms = 1536 + 512 + 2 * 7168
    matrix = 7168 * 256 // 2 + BF16 * 7168 * 256 // 32 + 8 * 2  # packed, scales, and the shape in two numbers of 8 bytes
    experts = 384 * 3 * matrix
    shared, router = 3 * 7168 * 256, 384 * 7168
    layers = planned("moonshotai/Kimi-K2.5", "h200", 2, 8, 2).layout.partition[0]
    every = BF16 * (attention + absorbed + norms)
    with_experts = experts + BF16 * (shared + router) + 4 * 384
    return layers * every + BF16 * 3 * 7168 * 2304 + (layers - 1) * with_experts + BF16 * 163840 // 8 * 7168


def gpt_oss_120b() -> int:
    """tp2 pp1 on Hopper: 1440 columns of each of 128 experts, padded to 1472; a byte for two weights and one for 32."""
    columns = 1472
    experts = 128 * (
        2 * columns * 2880 // 2 + 2 * columns * 2880 // 32 + BF16 * 2 * columns + 2880 * columns // 2 + 2880 * columns // 32
    )
    experts += 128 * BF16 * 2880
    attention = 2880 * 32 * 64 * 2 + 2880 * 4 * 64 * 2 + 32 * 64 + 2 * 4 * 64 + 2880 + 32  # with biases and sinks
    router = 128 * 2880 + 128
    return 36 * (experts + BF16 * (attention + router + 2 * 2880)) + BF16 * (2 * 201088 // 2 * 2880 + 2880)


def qwen25_72b() -> int:
    """tp4 pp1, with biases of q, k and v."""
    layer = 8192 * 16 * 128 * 2 + 8192 * 2 * 128 * 2 + (16 + 2 * 2) * 128 + 3 * 8192 * 7392 + 2 * 8192
    return BF16 * (80 * layer + 2 * 152064 // 4 * 8192 + 8192)


@pytest.mark.parametrize(
    ("repo", "gpu", "nodes", "tp", "pp", "calculation"),
    [
        ("meta-llama/Llama-3.1-405B", "h100", 2, 8, 2, llama_405b),
        ("RedHatAI/Meta-Llama-3.1-405B-Instruct-FP8-dynamic", "h100", 1, 8, 1, llama_405b_fp8),
        ("meta-llama/Llama-3.1-70B", "gh200-96", 2, 2, 1, llama_70b),
        ("Qwen/Qwen3-235B-A22B", "h200", 1, 4, 1, qwen3_235b),
        ("Qwen/Qwen3-235B-A22B-FP8", "gh200-96", 4, 4, 1, qwen3_235b_fp8),
        ("mistralai/Mixtral-8x22B-v0.1", "h100", 1, 8, 1, mixtral_8x22b),
        ("deepseek-ai/DeepSeek-V3", "h200", 2, 8, 2, deepseek_v3),
        ("deepseek-ai/DeepSeek-V3.2", "h200", 2, 8, 2, deepseek_v32),
        ("moonshotai/Kimi-K2.5", "h200", 2, 8, 2, kimi_k2_int4),
        ("openai/gpt-oss-120b", "gh200-96", 2, 2, 1, gpt_oss_120b),
        ("Qwen/Qwen2.5-72B-Instruct", "gh200-96", 4, 4, 1, qwen25_72b),
    ],
)
def test_a_rank_holds_what_the_calculation_says(
    repo: str, gpu: str, nodes: int, tp: int, pp: int, calculation: Callable[[], int]
) -> None:
    found = planned(repo, gpu, nodes, tp, pp)
    assert found.memory.by_stage_gib[0][0] == pytest.approx(calculation() / GIB, abs=0.0006)


@pytest.mark.parametrize(
    ("repo", "tp", "token"),
    [
        ("meta-llama/Llama-3.1-70B", 2, 2 * 4 * 128 * 2 * 80),
        ("Qwen/Qwen3-235B-A22B-FP8", 8, 2 * 1 * 128 * 2 * 94),  # four KV heads on eight ranks: each has one
        ("deepseek-ai/DeepSeek-V3", 8, (512 + 64) * 2 * 61),  # one vector for all heads, on every rank
        ("deepseek-ai/DeepSeek-V3.2", 8, ((512 + 64) * 2 + 128 + 4) * 61),  # and the indexer's key with its scale
        ("openai/gpt-oss-120b", 2, 2 * 4 * 64 * 2 * 18),  # the other 18 layers have a window
    ],
)
def test_a_token_takes_in_the_cache_what_its_attention_keeps(repo: str, tp: int, token: int) -> None:
    assert planned(repo, "h200", 1, tp, 1).memory.token_bytes == token


def test_layers_that_share_an_indexer_hold_none() -> None:
    """GLM-5.2's config.json lists them in indexer_types too: the first three, then every fourth."""
    model = models.built_in("zai-org/GLM-5.2-FP8", "main")
    assert model
    assert model.latent
    own = [0, 1, *range(2, 78, 4)]
    assert list(model.latent.index_layers) == own
    assert planned("zai-org/GLM-5.2-FP8", "b200", 1, 8, 1).memory.token_bytes == (512 + 64) * 2 * 78 + 132 * len(own)


def test_layers_with_a_window_take_room_for_a_request_and_not_for_each_token() -> None:
    found, window = planned("openai/gpt-oss-120b", "h200", 1, 2, 1), 18 * 2 * 4 * 64 * 2 * (128 + layouts.BATCHED)
    without = 0.9 * hardware.named("h200").mib * (1 << 20) - gpt_oss_120b() - layouts.RESERVE
    assert found.memory.cache_gib == pytest.approx((without - window) / GIB, abs=0.006)


def test_experts_whose_blocks_cannot_be_cut_are_dealt_out_whole() -> None:
    """1536 columns over eight ranks are 192, and a block of scales has 128 rows: vLLM raises there."""
    found = planned("Qwen/Qwen3-235B-A22B-FP8", "h200", 1, 8, 1)
    assert found.layout.expert_parallel
    expert = 3 * 4096 * 1536 + 4 * 3 * 32 * 12
    assert found.memory.weights_gib * GIB > 94 * 16 * expert
    with pytest.raises(
        LayoutError, match="the 192 columns of an expert on each rank are divisible by 128, the block size of the fp8"
    ):
        planned("Qwen/Qwen3-235B-A22B-FP8", "h200", 1, 8, 1, expert_parallel=False)
    assert not planned("Qwen/Qwen3-235B-A22B", "h200", 1, 8, 1).layout.expert_parallel  # 16 bit has no blocks


@pytest.mark.parametrize("entry", models.built_in_models(), ids=lambda entry: str(entry["names"][0]))
def test_every_built_in_model_is_planned_and_says_where_its_numbers_are_from(entry: dict[str, object]) -> None:
    names, source = entry["names"], str(entry["source"])
    assert isinstance(names, list)
    for name in names:  # a base model and its Instruct may differ, so both were read
        assert name.partition("/")[2].removeprefix("Meta-") in source
    assert re.search(r"wheel on PyPI|https://huggingface\.co/\S+/config\.json|https://github\.com/\S+ at [0-9a-f]{12}", source)
    model = models.built_in(names[0], "main")
    assert model
    question = Question(engine=engines.engine("vllm"), model=model, machines=placement.machines_of(hardware.named("b200"), 2))
    found = choosing.choose(question)
    assert found.best.prediction.tokens_per_s > 0
    assert sum(found.best.layout.partition) == model.layers


def test_a_base_model_and_its_instruct_may_differ() -> None:
    def numbers(repo: str) -> tuple[int, int]:
        model = models.built_in(repo, "main")
        assert model
        return model.vocab, model.max_len

    assert numbers("mistralai/Mixtral-8x22B-v0.1") == (32000, 65536)
    assert numbers("mistralai/Mixtral-8x22B-Instruct-v0.1") == (32768, 65536)
    assert numbers("Qwen/Qwen2.5-72B") == (152064, 131072)
    assert numbers("Qwen/Qwen2.5-72B-Instruct") == (152064, 32768)


def test_what_a_gpu_cannot_run_is_refused_with_the_engines_rule() -> None:
    """NVFP4 runs on Hopper in vLLM 0.26.0, by Marlin (its least capability is 7.5); FP8 of modelopt begins at 8.9."""
    assert planned("nvidia/Qwen3-235B-A22B-NVFP4", "h100", 1, 4, 1).layout.tp == 4
    model = models.built_in("nvidia/Qwen3-235B-A22B-NVFP4", "main")
    assert model
    assert model.quantization
    stored = model.quantization.model_copy(update={"method": "fp8", "name": "modelopt FP8", "bits": 8, "group": None})
    question = Question(
        engine=engines.engine("vllm"),
        model=model.model_copy(update={"quantization": stored}),
        machines=placement.machines_of(hardware.named("a100"), 1),
    )
    with pytest.raises(LayoutError, match=r"requires compute capability 8.9 for modelopt FP8 weights, but this GPU has 8.0"):
        choosing.choose(question)


def test_aphrodite_is_planned_for_what_its_splits_were_read_for() -> None:
    model = models.built_in("Qwen/Qwen2.5-72B-Instruct", "main")
    assert model
    question = Question(
        engine=engines.engine("aphrodite"), model=model, machines=placement.machines_of(hardware.named("gh200-96"), 4)
    )
    with pytest.raises(
        LayoutError, match="the planner knows how aphrodite splits Llama in 16 bit, but not Qwen2ForCausalLM"
    ) as caught:
        choosing.choose(question)
    assert "vllm" in caught.value.remedy
