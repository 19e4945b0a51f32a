"""How a model is split over GPUs, what each of them then holds, and what fits beside it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Layout(BaseModel):
    """A way to split a model over nodes. Global rank = stage * tp + rank within the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: PositiveInt
    "Tensor parallel: GPUs that share every layer."
    pp: PositiveInt
    "Pipeline parallel: stages, each with layers of its own."
    partition: tuple[PositiveInt, ...]
    "Layers of each stage."
    offload_gib: float = Field(default=0, ge=0)
    "Weights in host memory, per GPU."
    max_model_len: PositiveInt
    "Tokens of the longest request, prompt and answer together."
    max_num_seqs: PositiveInt
    "Requests that are worked on at the same time."
    max_num_batched_tokens: PositiveInt
    "Tokens of one step; prompts that are longer are cut into chunks."
    gmu: float = Field(gt=0, le=1)
    "Share of a GPU's memory that the engine takes."

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.tp * self.pp

    @property
    def name(self) -> str:
        """As people say it."""
        return f"tp{self.tp} pp{self.pp}"
