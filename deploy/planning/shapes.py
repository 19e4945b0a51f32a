"""The numbers of a model that decide what fits where: layers, heads, experts, latent attention, quantisation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from deploy.planning.tensors import Tensor

BYTES = 2
"Per weight that is not quantised and per element of the KV cache: bfloat16 or float16; engines turn float32 into float16."
COMMIT = re.compile(r"[0-9a-f]{40}")

Dimension = Annotated[int, Field(gt=0, le=1 << 31)]
"A dimension: what is larger is no model's."
QuantMethod = Literal["fp8", "fbgemm_fp8", "int", "awq", "gptq", "mxfp4", "nvfp4"]
"What the bytes of a quantised weight look like; deploy/planning/quantization.py has each."


class ModelPart(BaseModel):
    """A frozen value; unknown names are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Experts(ModelPart):
    """Mixture of experts."""

    count: Dimension
    per_token: Dimension
    columns: Dimension
    "MLP columns of each expert."
    shared_columns: NonNegativeInt = 0
    "MLP columns of the experts that every token passes; 0: there are none."
    layers: tuple[NonNegativeInt, ...]
    "Layers that have experts; the others have one MLP."

    @model_validator(mode="after")
    def _possible(self) -> Experts:
        if self.per_token > self.count:
            msg = f"a token passes {self.per_token} experts, and there are {self.count}"
            raise ValueError(msg)
        return self


class Latent(ModelPart):
    """Multi-head latent attention: the cache holds one compressed vector a token, whatever the heads."""

    q_rank: PositiveInt | None
    kv_rank: PositiveInt
    nope: PositiveInt
    "Dimensions of a head's query and key without position."
    rope: PositiveInt
    value: PositiveInt
    "Dimensions of a head's value."
    index_heads: PositiveInt | None = None
    "Sparse attention: heads of the indexer, which chooses the tokens that are looked at; None: all are."
    index_dim: PositiveInt = 128
    index_layers: tuple[NonNegativeInt, ...] = ()
    "Layers with an indexer of their own; the others use the choice of the one before."


class Quantization(ModelPart):
    """How weights are stored."""

    method: QuantMethod
    name: str
    "As config.json says it."
    block: tuple[PositiveInt, PositiveInt] | None = None
    "fp8: rows and columns that share a scale; None: a scale for the tensor or for each row."
    per_row: bool = False
    "fp8 without blocks: a scale for each row, else one for the tensor."
    bits: PositiveInt = 8
    group: PositiveInt | None = None
    "Weights that share a scale along a row."
    ignored: tuple[str, ...] = ()
    "Modules that stay as they are: names, beginnings of names, globs, `re:` expressions."


class Stored(ModelPart):
    """The tensors that a checkpoint has, as its headers say: what they weigh is read, not computed."""

    kinds: tuple[tuple[Tensor, ...], ...]
    "Layers that differ."
    order: tuple[NonNegativeInt, ...]
    "For each layer its kind."
    outer: tuple[Tensor, ...]
    "Embedding, last norm, output layer."
    other: NonNegativeInt
    "Bytes of everything else, as a part for images: every rank is taken to hold all of it."


class Model(ModelPart):
    """A model at a revision. Names as in the field, not as in config.json."""

    repo: str
    revision: str
    "A commit; a branch or tag where nobody could be asked for its commit."
    architecture: str = "LlamaForCausalLM"
    layers: Dimension
    hidden: Dimension
    heads: Dimension
    kv_heads: Dimension
    head_dim: Dimension
    mlp: Dimension
    "MLP columns of layers without experts."
    vocab: Dimension
    max_len: Dimension
    tied: bool = False
    "The output layer is the embedding."
    attention_bias: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    quantization: Quantization | None = None
    window: PositiveInt | None = None
    "Tokens that a layer with a window sees."
    full_layers: tuple[NonNegativeInt, ...] | None = None
    "Layers that see all tokens; None: all do."
    vision: bool = False
    "It has a part for images, whose bytes config.json does not give."
    stored: Stored | None = None
    "None: there were no files to read; the tensors are those that the architecture gives these numbers."
    source: str = ""
    "Where the numbers are from, for people."

    @model_validator(mode="after")
    def _possible(self) -> Model:
        if self.heads % self.kv_heads:
            msg = f"{self.heads} attention heads do not divide by {self.kv_heads} KV heads"
            raise ValueError(msg)
        return self

    @property
    def pinned(self) -> bool:
        """The revision is a commit."""
        return COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> Model:
        """The same numbers, at a revision that was resolved."""
        return self.model_copy(update={"revision": revision})

    def sees_all(self, layer: int) -> bool:
        """Whether a layer's attention has no window."""
        return self.full_layers is None or layer in self.full_layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer in self.experts.layers
