"""Architectures: how each uses the numbers of config.json, and which tensors its layers have.

Names and shapes are those of the checkpoints, as the model classes of vLLM 0.26.0 load them (vllm/model_executor/models).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from deploy.planning import configjson, quantization
from deploy.planning.quantization import MXFP4_GROUP
from deploy.planning.shapes import Experts, Latent, Model, Quantization
from deploy.planning.tensors import Tensor

Bias = Literal["config", "qkv", "all"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The differences between the architectures."""

    bias: Bias = "config"
    "Biases of attention: from attention_bias in config.json, always for q, k and v, or always for all four."
    query_norm: bool = False
    "Query and key each have a norm with the size of one head."
    mlp: str = "mlp"
    "The module of the MLP or the experts."
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    "Names of an expert's matrices."
    fused_experts: bool = False
    "All experts of a layer are in one tensor."
    shared: str = "shared_experts"
    nested: bool = False
    "The numbers are in text_config of config.json."


_LLAMA = Architecture()
_DEEPSEEK = Architecture()
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": Architecture(bias="qkv"),
        "Qwen3ForCausalLM": Architecture(query_norm=True),
        "Qwen3MoeForCausalLM": Architecture(query_norm=True),
        "MixtralForCausalLM": Architecture(mlp="block_sparse_moe", names=("w1", "w3", "w2")),
        "DeepseekV3ForCausalLM": _DEEPSEEK,
        "DeepseekV32ForCausalLM": _DEEPSEEK,
        "GlmMoeDsaForCausalLM": _DEEPSEEK,
        "KimiK25ForConditionalGeneration": Architecture(nested=True),
        "GptOssForCausalLM": Architecture(bias="all", router="router", fused_experts=True),
        "Llama4ForConditionalGeneration": Architecture(
            mlp="feed_forward", router="router", fused_experts=True, shared="shared_expert", nested=True
        ),
    }
)
DENSE = ("LlamaForCausalLM", "MistralForCausalLM")
"Architectures for which the uneven splits of Aphrodite 0.6.4 were checked."


# from config.json


def model_of(name: str, config: Mapping[str, Any], *, repo: str, revision: str, source: str) -> Model:
    """The model of a config.json of a known architecture.

    Raises:
        KeyError: a number is missing.
        ValidationError: a value is wrong.
        NotImplementedError: the quantisation is unknown; the message is its name.
    """
    about = ARCHITECTURES[name]
    config = configjson.checked(config)
    numbers: Mapping[str, Any] = config["text_config"] if about.nested else config
    stored = quantization.of_config(numbers) or quantization.of_config(config)
    if isinstance(stored, str):
        raise NotImplementedError(stored)
    heads, layers = numbers["num_attention_heads"], numbers["num_hidden_layers"]
    llama4 = name == "Llama4ForConditionalGeneration"
    return Model(
        repo=repo,
        revision=revision,
        architecture=name,
        layers=layers,
        hidden=numbers["hidden_size"],
        heads=heads,
        kv_heads=numbers.get("num_key_value_heads", heads),
        head_dim=numbers["head_dim"] if "head_dim" in numbers else numbers["hidden_size"] // heads,
        mlp=numbers["intermediate_size_mlp"] if llama4 else numbers["intermediate_size"],
        vocab=numbers["vocab_size"],
        max_len=numbers["max_position_embeddings"],
        tied=numbers.get("tie_word_embeddings", False),
        attention_bias=about.bias == "all" or numbers.get("attention_bias", False),
        mlp_bias=numbers.get("mlp_bias", False),
        experts=_experts(name, numbers, layers),
        latent=_latent(numbers, layers) if numbers.get("kv_lora_rank") else None,
        quantization=stored,
        window=_window(name, numbers),
        full_layers=_full_layers(name, numbers, layers),
        vision=about.nested,
        source=source,
    )


def _experts(name: str, numbers: Mapping[str, Any], layers: int) -> Experts | None:
    match name:
        case "MixtralForCausalLM" | "GptOssForCausalLM":
            return Experts(
                count=numbers["num_local_experts"],
                per_token=numbers["num_experts_per_tok"],
                columns=numbers["intermediate_size"],
                layers=tuple(range(layers)),
            )
        case "Qwen3MoeForCausalLM":
            step, plain = numbers.get("decoder_sparse_step", 1), numbers.get("mlp_only_layers", ())
            return Experts(
                count=numbers["num_experts"],
                per_token=numbers["num_experts_per_tok"],
                columns=numbers["moe_intermediate_size"],
                layers=tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in plain),
            )
        case _ if numbers.get("n_routed_experts"):  # DeepSeek and similar models
            step = numbers.get("moe_layer_freq", 1)
            columns = numbers["moe_intermediate_size"]
            return Experts(
                count=numbers["n_routed_experts"],
                per_token=numbers["num_experts_per_tok"],
                columns=columns,
                shared_columns=columns * (numbers.get("n_shared_experts", 0)),
                layers=tuple(layer for layer in range(numbers["first_k_dense_replace"], layers) if layer % step == 0),
            )
        case "Llama4ForConditionalGeneration":
            step, columns = numbers["interleave_moe_layer_step"], numbers["intermediate_size"]
            return Experts(
                count=numbers["num_local_experts"],
                per_token=numbers["num_experts_per_tok"],
                columns=columns,
                shared_columns=columns,
                layers=tuple(range(step - 1, layers, step)),
            )
    return None


def _latent(numbers: Mapping[str, Any], layers: int) -> Latent:
    return Latent(
        index_heads=numbers.get("index_n_heads"),
        index_dim=numbers.get("index_head_dim") or 128,
        index_layers=_index_layers(numbers, layers) if numbers.get("index_n_heads") else (),
        q_rank=numbers.get("q_lora_rank"),
        kv_rank=numbers["kv_lora_rank"],
        nope=numbers["qk_nope_head_dim"],
        rope=numbers["qk_rope_head_dim"],
        value=numbers["v_head_dim"],
    )


def _index_layers(numbers: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers with an indexer (vLLM 0.26.0, deepseek_v2.py)."""
    pattern = numbers.get("index_topk_pattern")
    if pattern:
        return tuple(layer for layer in range(layers) if layer >= len(pattern) or pattern[layer] != "S")
    often, offset = numbers.get("index_topk_freq", 1), numbers.get("index_skip_topk_offset", 2)
    return tuple(layer for layer in range(layers) if max(layer - offset + 1, 0) % often == 0)


def _window(name: str, numbers: Mapping[str, Any]) -> int | None:
    match name:
        case "GptOssForCausalLM":
            return int(numbers["sliding_window"])
        case "Llama4ForConditionalGeneration":
            return int(numbers.get("attention_chunk_size") or 8192)
    return None


def _full_layers(name: str, numbers: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    match name:
        case "GptOssForCausalLM":
            kinds: Sequence[str] = numbers.get("layer_types") or ["sliding_attention", "full_attention"] * layers
            return tuple(layer for layer in range(layers) if kinds[layer] == "full_attention")
        case "Llama4ForConditionalGeneration":
            return tuple(range(3, layers, 4))  # every fourth layer has no positions and no window
    return None


# tensors


@lru_cache(maxsize=4096)
def layer_tensors(model: Model, layer: int) -> tuple[Tensor, ...]:
    """The tensors of a decoder layer in a checkpoint, with `*` for the number of an expert."""
    if model.stored:
        return model.stored.kinds[model.stored.order[layer]]
    attention = _latent_attention if model.latent else _attention
    mlp = _expert_tensors if model.has_experts(layer) else _mlp
    norms = (_plain(f"{name}.weight", model.hidden) for name in ("input_layernorm", "post_attention_layernorm"))
    return (*attention(model, layer), *mlp(model, layer), *norms)


def outer_tensors(model: Model) -> tuple[Tensor, ...]:
    """The tensors outside of the layers: embedding, last norm, output layer."""
    if model.stored:
        return model.stored.outer
    embedding, head = (_plain(name, model.vocab, model.hidden) for name in ("embed_tokens.weight", "lm_head.weight"))
    norm = _plain("norm.weight", model.hidden)
    return (embedding, norm) if model.tied else (embedding, norm, head)


def _plain(name: str, *shape: int, dtype: str = "BF16") -> Tensor:
    return Tensor(name=name, shape=shape, dtype=dtype)


def _matrix(model: Model, layer: int, module: str, rows: int, columns: int, *, count: int = 1) -> tuple[Tensor, ...]:
    """The stored tensors of a weight matrix."""
    stored: Quantization | None = model.quantization
    if stored and quantization.ignores(stored, f"model.layers.{layer}.{module.replace('*', '0')}"):
        stored = None
    return quantization.linear(stored, module, rows, columns, count=count)


def _attention(model: Model, layer: int) -> Iterator[Tensor]:
    about = ARCHITECTURES[model.architecture]
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for name, rows, columns in (
        ("q_proj", query, model.hidden),
        ("k_proj", key, model.hidden),
        ("v_proj", key, model.hidden),
        ("o_proj", model.hidden, query),
    ):
        yield from _matrix(model, layer, f"self_attn.{name}", rows, columns)
        if model.attention_bias or (about.bias == "qkv" and name != "o_proj"):
            yield _plain(f"self_attn.{name}.bias", rows)
    if about.query_norm:
        yield from (_plain(f"self_attn.{name}.weight", model.head_dim) for name in ("q_norm", "k_norm"))
    if model.architecture == "GptOssForCausalLM":
        yield _plain("self_attn.sinks", model.heads)


def _latent_attention(model: Model, layer: int) -> Iterator[Tensor]:
    latent = model.latent
    assert latent is not None
    query = model.heads * (latent.nope + latent.rope)
    if latent.q_rank:
        yield from _matrix(model, layer, "self_attn.q_a_proj", latent.q_rank, model.hidden)
        yield _plain("self_attn.q_a_layernorm.weight", latent.q_rank)
        yield from _matrix(model, layer, "self_attn.q_b_proj", query, latent.q_rank)
    else:
        yield from _matrix(model, layer, "self_attn.q_proj", query, model.hidden)
    yield from _matrix(model, layer, "self_attn.kv_a_proj_with_mqa", latent.kv_rank + latent.rope, model.hidden)
    yield _plain("self_attn.kv_a_layernorm.weight", latent.kv_rank)
    yield from _matrix(model, layer, "self_attn.kv_b_proj", model.heads * (latent.nope + latent.value), latent.kv_rank)
    yield from _matrix(model, layer, "self_attn.o_proj", model.hidden, model.heads * latent.value)
    if latent.index_heads and latent.q_rank and layer in latent.index_layers:
        yield from _matrix(model, layer, "self_attn.indexer.wq_b", latent.index_heads * latent.index_dim, latent.q_rank)
        yield from _matrix(model, layer, "self_attn.indexer.wk", latent.index_dim, model.hidden)
        yield _plain("self_attn.indexer.weights_proj.weight", latent.index_heads, model.hidden)
        yield from (_plain(f"self_attn.indexer.k_norm.{name}", latent.index_dim) for name in ("weight", "bias"))


def _gated(
    model: Model, layer: int, module: str, columns: int, names: tuple[str, str, str], *, count: int = 1
) -> Iterator[Tensor]:
    gate, up, down = names
    for name in (gate, up):
        yield from _matrix(model, layer, f"{module}.{name}", columns, model.hidden, count=count)
    yield from _matrix(model, layer, f"{module}.{down}", model.hidden, columns, count=count)


def _mlp(model: Model, layer: int) -> Iterator[Tensor]:
    about = ARCHITECTURES[model.architecture]
    yield from _gated(model, layer, about.mlp, model.mlp, _LLAMA.names)
    if model.mlp_bias:
        sizes = {"gate_proj": model.mlp, "up_proj": model.mlp, "down_proj": model.hidden}
        yield from (_plain(f"{about.mlp}.{name}.bias", size) for name, size in sizes.items())


def _expert_tensors(model: Model, layer: int) -> Iterator[Tensor]:
    about, experts = ARCHITECTURES[model.architecture], model.experts
    assert experts is not None
    yield _plain(f"{about.mlp}.{about.router}.weight", experts.count, model.hidden)
    if model.architecture == "GptOssForCausalLM":
        yield _plain(f"{about.mlp}.{about.router}.bias", experts.count)
    if model.latent:
        yield _plain(f"{about.mlp}.{about.router}.e_score_correction_bias", experts.count, dtype="F32")
    if about.fused_experts:
        yield from _fused_experts(model, experts, about.mlp)
    else:
        yield from _gated(model, layer, f"{about.mlp}.experts.*", experts.columns, about.names, count=experts.count)
    if experts.shared_columns:
        yield from _gated(model, layer, f"{about.mlp}.{about.shared}", experts.shared_columns, _LLAMA.names)


def _fused_experts(model: Model, experts: Experts, mlp: str) -> Iterator[Tensor]:
    both, hidden = 2 * experts.columns, model.hidden
    name = f"{mlp}.experts"
    if model.quantization and model.quantization.method == "mxfp4":
        for matrix, rows, columns in (("gate_up_proj", both, hidden), ("down_proj", hidden, experts.columns)):
            groups = columns // MXFP4_GROUP
            yield _plain(f"{name}.{matrix}_blocks", experts.count, rows, groups, MXFP4_GROUP // 2, dtype="U8")
            yield _plain(f"{name}.{matrix}_scales", experts.count, rows, groups, dtype="U8")
            yield _plain(f"{name}.{matrix}_bias", experts.count, rows)
        return
    yield _plain(f"{name}.gate_up_proj", experts.count, hidden, both)
    yield _plain(f"{name}.down_proj", experts.count, experts.columns, hidden)
    if model.architecture == "GptOssForCausalLM":
        yield _plain(f"{name}.gate_up_proj_bias", experts.count, both)
        yield _plain(f"{name}.down_proj_bias", experts.count, hidden)


@lru_cache(maxsize=64)
def active_parameters(model: Model) -> int:
    """Number of weights that process a token; of the routed experts only the selected ones."""
    plain = model.model_copy(update={"quantization": None, "stored": None})
    total = 0
    for layer in range(model.layers):
        for tensor in layer_tensors(plain, layer):
            used = model.experts is not None and ".experts." in tensor.name
            total += (
                tensor.elements * model.experts.per_token // model.experts.count if used and model.experts else tensor.elements
            )
    return total + model.vocab * model.hidden
