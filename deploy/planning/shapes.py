"""The dimensions of a model that determine its memory: layers, heads, experts, latent attention, quantisation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from deploy.planning.tensors import Tensor

BYTES = 2
"Bytes of an unquantised weight and of an element of the KV cache: bfloat16 or float16. Engines convert float32 to float16."
COMMIT = re.compile(r"[0-9a-f]{40}")
LOCAL = "local"
"The revision of a model that is a folder on this machine."

Dimension = Annotated[int, Field(gt=0, le=1 << 31)]
"A dimension, with an upper limit that no real model reaches."
QuantMethod = Literal["fp8", "fbgemm_fp8", "int", "awq", "gptq", "mxfp4", "nvfp4"]
"Formats of quantised weights; see deploy/planning/quantization.py."


class ModelPart(BaseModel):
    """A frozen value. Unknown names are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Experts(ModelPart):
    """Mixture of experts."""

    count: Dimension
    per_token: Dimension
    columns: Dimension
    "MLP columns of each expert."
    shared_columns: NonNegativeInt = 0
    "MLP columns of the shared experts, which process every token; 0: no shared experts."
    layers: tuple[NonNegativeInt, ...]
    "Layers with experts; the others have one MLP."

    @model_validator(mode="after")
    def _possible(self) -> Experts:
        if self.per_token > self.count:
            msg = f"{self.per_token} experts per token, but only {self.count} experts"
            raise ValueError(msg)
        return self


class Latent(ModelPart):
    """Multi-head latent attention: the cache has one compressed vector per token, for any number of heads."""

    q_rank: PositiveInt | None
    kv_rank: PositiveInt
    nope: PositiveInt
    "Dimensions of query and key of a head, without the position part."
    rope: PositiveInt
    value: PositiveInt
    "Dimensions of the value of a head."
    index_heads: PositiveInt | None = None
    "Sparse attention: heads of the indexer, which selects the tokens to attend to; None: attention to all tokens."
    index_dim: PositiveInt = 128
    index_layers: tuple[NonNegativeInt, ...] = ()
    "Layers with an indexer; the others use the selection of the previous layer."


class Quantization(ModelPart):
    """The format of quantised weights."""

    method: QuantMethod
    name: str
    "Name in config.json."
    block: tuple[PositiveInt, PositiveInt] | None = None
    "fp8: rows and columns of a block with one scale; None: one scale for the tensor or for each row."
    per_row: bool = False
    "fp8 without blocks: one scale for each row, else one for the tensor."
    bits: PositiveInt = 8
    group: PositiveInt | None = None
    "Number of weights in a row that share a scale."
    ignored: tuple[str, ...] = ()
    "Modules that are not quantised: names, prefixes, globs, or `re:` expressions."


class Stored(ModelPart):
    """The tensors of a checkpoint, read from its headers. Their sizes are exact."""

    kinds: tuple[tuple[Tensor, ...], ...]
    "The distinct layers."
    order: tuple[NonNegativeInt, ...]
    "For each layer, its index in kinds."
    outer: tuple[Tensor, ...]
    "Embedding, last norm, output layer."
    other: NonNegativeInt
    "Bytes of everything else, such as a vision encoder. The planner assumes that every rank has all of it."


class Model(ModelPart):
    """A model at a revision. The names are common terms, not those of config.json."""

    repo: str
    revision: str
    "A commit; a branch or tag if its commit could not be looked up; or LOCAL."
    architecture: str = "LlamaForCausalLM"
    layers: Dimension
    hidden: Dimension
    heads: Dimension
    kv_heads: Dimension
    head_dim: Dimension
    mlp: Dimension
    "MLP columns of the layers without experts."
    vocab: Dimension
    max_len: Dimension
    tied: bool = False
    "The output layer and the embedding share their weights."
    attention_bias: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    quantization: Quantization | None = None
    window: PositiveInt | None = None
    "Tokens in the window of a layer with sliding window attention."
    full_layers: tuple[NonNegativeInt, ...] | None = None
    "Layers without a window; None: all."
    vision: bool = False
    "It has a vision encoder, whose size is not in config.json."
    stored: Stored | None = None
    "The tensors of the checkpoint; None: not read, and derived from the architecture."
    source: str = ""
    "Source of the numbers, for messages."

    @model_validator(mode="after")
    def _possible(self) -> Model:
        if self.heads % self.kv_heads:
            msg = f"{self.heads} attention heads are not divisible by {self.kv_heads} KV heads"
            raise ValueError(msg)
        return self

    @property
    def pinned(self) -> bool:
        """True if `deploy up` does not resolve the revision: it is a commit, or the model is a local folder."""
        return self.revision == LOCAL or COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> Model:
        """The same model at another revision."""
        return self.model_copy(update={"revision": revision})

    def sees_all(self, layer: int) -> bool:
        """Whether the attention of a layer has no window."""
        return self.full_layers is None or layer in self.full_layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer in self.experts.layers
