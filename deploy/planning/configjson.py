"""The keys of config.json that the planner reads, with the values that each may have. The planner reads no other keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from deploy.planning.shapes import Dimension

MOST_LAYERS = 1000
"An upper limit that no model reaches, so that a wrong number cannot fill the memory of this machine."
FLOATS = r"(torch\.)?(b?float16|float|float32|float64|half|double|float8_\w+|auto)"
"The types of numbers that weights can have in torch."


def _patterns(names: list[str]) -> list[str]:
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            msg = f"{name} is not a regular expression: {error}"
            raise ValueError(msg) from error
    return names


def _group(size: int) -> int:
    if size < 1 and size != -1:
        msg = f"a group of {size} weights is not possible"
        raise ValueError(msg)
    return size


Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
Number = Annotated[int, Field(ge=0, le=1 << 31)]
"0 means the same as a missing key."
Block = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Modules = Annotated[list[str], AfterValidator(_patterns)]
Group = Annotated[int, AfterValidator(_group)]
"-1: one group for the whole row."
Float = Annotated[str, Field(pattern=f"^{FLOATS}$")]


class ConfigPart(BaseModel):
    """An object in config.json. null means the same as a missing key."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Weights(ConfigPart):
    """`weights` of a group of compressed-tensors."""

    num_bits: PositiveInt | None = None
    type: str | None = None
    strategy: str | None = None
    group_size: Group | None = None
    block_structure: Block | None = None


class ConfigGroup(ConfigPart):
    """A group of compressed-tensors."""

    weights: Weights | None = None


class Algorithm(ConfigPart):
    """`quantization` of modelopt."""

    quant_algo: str | None = None


class QuantizationTable(ConfigPart):
    """`quantization_config`."""

    quant_method: str | None = None
    quant_algo: str | None = None
    quantization: Algorithm | None = None
    format: str | None = None
    bits: PositiveInt | None = None
    group_size: Group | None = None
    weight_block_size: Block | None = None
    config_groups: dict[str, ConfigGroup] | None = None
    modules_to_not_convert: Modules | None = None
    ignore: Modules | None = None
    exclude_modules: Modules | None = None


class Numbers(ConfigPart):
    """The numbers of a model: the whole config.json, or its `text_config`."""

    torch_dtype: Float | None = None
    dtype: Float | None = None
    quantization_config: QuantizationTable | None = None
    compression_config: QuantizationTable | None = None
    num_hidden_layers: Layers | None = None
    hidden_size: Dimension | None = None
    num_attention_heads: Dimension | None = None
    num_key_value_heads: Dimension | None = None
    head_dim: Dimension | None = None
    intermediate_size: Dimension | None = None
    intermediate_size_mlp: Dimension | None = None
    vocab_size: Dimension | None = None
    max_position_embeddings: Dimension | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    num_experts: Number | None = None
    num_local_experts: Number | None = None
    n_routed_experts: Number | None = None
    n_shared_experts: Number | None = None
    num_experts_per_tok: Number | None = None
    moe_intermediate_size: Number | None = None
    decoder_sparse_step: PositiveInt | None = None
    mlp_only_layers: list[NonNegativeInt] | None = None
    moe_layer_freq: PositiveInt | None = None
    first_k_dense_replace: Number | None = None
    interleave_moe_layer_step: PositiveInt | None = None
    q_lora_rank: Number | None = None
    kv_lora_rank: Number | None = None
    qk_nope_head_dim: Number | None = None
    qk_rope_head_dim: Number | None = None
    v_head_dim: Number | None = None
    index_n_heads: Number | None = None
    index_head_dim: Number | None = None
    index_topk_freq: PositiveInt | None = None
    index_skip_topk_offset: Number | None = None
    index_topk_pattern: str | list[str] | None = None
    sliding_window: Number | None = None
    attention_chunk_size: Number | None = None
    layer_types: list[str] | None = None

    @model_validator(mode="after")
    def _every_layer(self) -> Numbers:
        if self.layer_types is not None and len(self.layer_types) < (self.num_hidden_layers or 0):
            msg = f"layer_types has {len(self.layer_types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
            raise ValueError(msg)
        return self


class ConfigJson(Numbers):
    """A config.json."""

    text_config: Numbers | None = None


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the planner reads, without those that are null. Raises pydantic.ValidationError."""
    return ConfigJson.model_validate(dict(config)).model_dump(exclude_none=True)
