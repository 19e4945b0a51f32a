"""The numbers of a Llama-shaped model that decide what fits where: from a config.json, from the Hub, or built in."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from deploy.nodes.config import ModelConfig
from gracefarm.errors import ConfigError, FetchError, LayoutError

if TYPE_CHECKING:
    import httpx

ENDPOINT = "https://huggingface.co"
LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")
"Architectures whose tensors are those of `Model`: grouped-query attention, gated MLP, two norms a layer."
BYTES = 2
"Per weight and per KV element: bfloat16 or float16; engines turn float32 into float16."
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0


class GatedError(FetchError):
    """The Hub has it and does not give its files."""


class Model(BaseModel):
    """A model at a revision. Names as in the field, not as in config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    revision: str
    "A commit; a branch or tag where nobody could be asked for its commit."
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    mlp: PositiveInt
    vocab: PositiveInt
    max_len: PositiveInt
    tied: bool = False
    "The output layer is the embedding."
    attention_bias: bool = False
    mlp_bias: bool = False
    source: str = ""
    "Where the numbers are from, for people."

    @property
    def pinned(self) -> bool:
        """The revision is a commit."""
        return COMMIT.fullmatch(self.revision) is not None

    def layer_tensors(self) -> dict[str, int]:
        """Elements of each tensor of a decoder layer, by its name in the checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors = {
            "self_attn.q_proj.weight": q * self.hidden,
            "self_attn.k_proj.weight": kv * self.hidden,
            "self_attn.v_proj.weight": kv * self.hidden,
            "self_attn.o_proj.weight": self.hidden * q,
            "mlp.gate_proj.weight": self.mlp * self.hidden,
            "mlp.up_proj.weight": self.mlp * self.hidden,
            "mlp.down_proj.weight": self.hidden * self.mlp,
            "input_layernorm.weight": self.hidden,
            "post_attention_layernorm.weight": self.hidden,
        }
        if self.attention_bias:
            sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": self.hidden}
            tensors |= {f"self_attn.{name}.bias": size for name, size in sizes.items()}
        if self.mlp_bias:
            sizes = {"gate_proj": self.mlp, "up_proj": self.mlp, "down_proj": self.hidden}
            tensors |= {f"mlp.{name}.bias": size for name, size in sizes.items()}
        return tensors

    def at(self, revision: str) -> Model:
        """The same numbers, at a revision that somebody resolved."""
        return self.model_copy(update={"revision": revision})


def from_config(config: object, *, repo: str, revision: str, source: str) -> Model:
    """The model of a config.json.

    Raises:
        LayoutError: not Llama-shaped, or quantised: its bytes would be guessed.
        ConfigError: a number is missing or no number.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: config.json is a {type(config).__name__}, not a table", remedy="is it the model's own?")
    named = config.get("architectures")
    architectures = named if isinstance(named, list) and named else ["none named"]
    if architectures[0] not in LLAMA:
        raise LayoutError(
            f"{repo}: the planner knows {' and '.join(LLAMA)}, not {architectures[0]}",
            remedy="a model of another shape is served by hand",
        )
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise LayoutError(
            f"{repo}: its weights are quantised ({method}), and the planner knows the bytes of 16-bit weights alone",
            remedy="plan the repository with 16-bit weights",
        )
    try:
        heads = config["num_attention_heads"]
        return Model(
            repo=repo,
            revision=revision,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocab=config["vocab_size"],
            max_len=config.get("max_position_embeddings", 2048),
            tied=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            source=source,
        )
    except KeyError as error:
        raise ConfigError(f"{source}: config.json has no {error.args[0]}", remedy="is it the whole file?") from error
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{source}: a number of config.json is wrong: {error}", remedy="is it the whole file?") from error


def from_file(path: Path, *, repo: str, revision: str) -> Model:
    """The model of a local config.json, or of the folder that has it. Raises ConfigError, LayoutError."""
    place = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(place.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{place}: no such file", remedy="[model] config names a config.json") from error
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}", remedy="is it the whole file?") from error
    return from_config(config, repo=repo, revision=revision, source=str(path))


@cache
def built_in_models() -> list[dict[str, Any]]:
    """The models whose public numbers are built in."""
    return list(tomllib.loads((resources.files("deploy") / "data" / "models.toml").read_text())["model"])


def built_in(repo: str, revision: str) -> Model | None:
    """The model's public numbers, where they are built in."""
    for entry in built_in_models():
        if repo in entry["names"]:
            return from_config(entry, repo=repo, revision=revision, source="built-in numbers")
    return None


def endpoint() -> str:
    """HF_ENDPOINT, else the Hub."""
    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def from_hub(repo: str, revision: str, *, token: str | None = None) -> Model:
    """The model at the Hub (HF_ENDPOINT), its revision resolved to a commit.

    Raises:
        FetchError: not reached, no such repository or revision, or gated.
    """
    commit = resolve(repo, revision, token=token)
    config = _ask(f"{repo}/resolve/{commit}/config.json", repo, revision, token)
    return from_config(config, repo=repo, revision=commit, source=endpoint())


def resolve(repo: str, revision: str, *, token: str | None = None) -> str:
    """The commit of a branch, tag or commit; gated repositories tell it too. Raises FetchError."""
    commit = str(_ask(f"api/models/{repo}/revision/{revision}", repo, revision, token).get("sha", ""))
    if not COMMIT.fullmatch(commit):
        raise FetchError(f"{endpoint()} does not answer as a Hub does", remedy="check HF_ENDPOINT")
    return commit


def _ask(path: str, repo: str, revision: str, token: str | None) -> dict[str, Any]:
    import httpx  # a fifth of what a command's start costs, and few need it

    base = endpoint()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers) as client:
            answer = _get(client, f"{base}/{path}", repo, revision).json()
    except httpx.HTTPError as error:
        raise FetchError(
            f"{base} cannot be reached: {error or type(error).__name__}",
            remedy="set HF_ENDPOINT to a mirror, or [model] config to a local config.json",
        ) from error
    except ValueError as error:
        raise FetchError(f"{base} does not answer as a Hub does", remedy="check HF_ENDPOINT") from error
    return answer if isinstance(answer, dict) else {}


def _get(client: httpx.Client, url: str, repo: str, revision: str) -> httpx.Response:
    answer = client.get(url)
    if answer.status_code in (401, 403):
        raise GatedError(
            f"{repo} is gated or private: the Hub says {answer.status_code}",
            remedy=f"accept its licence at {endpoint()}/{repo} and set HF_TOKEN, or [model] config to a local config.json",
        )
    if answer.status_code == 404:
        raise FetchError(f"the Hub has no {repo} at {revision}", remedy="check [model] repo and revision")
    if answer.status_code != 200:
        raise FetchError(f"{url}: {answer.status_code}", remedy="try again later, or another HF_ENDPOINT")
    return answer


def find(wanted: ModelConfig, base: Path, *, offline: bool = False) -> tuple[Model, str]:
    """The model that deploy.toml wants, and what a person should know about the source ("": nothing).

    A local config.json comes first, then the Hub, then the built-in numbers; `offline`: the Hub is not asked.
    Raises:
        FetchError: none of them has it. ConfigError, LayoutError: as `from_config`.
    """
    if wanted.config:
        return from_file(base / Path(wanted.config).expanduser(), repo=wanted.repo, revision=wanted.revision), ""
    known = built_in(wanted.repo, wanted.revision)
    if offline and known:
        return known, ""
    token = os.environ.get("HF_TOKEN")
    try:
        return from_hub(wanted.repo, wanted.revision, token=token), ""
    except FetchError as error:
        if known is None:
            raise
        if isinstance(error, GatedError):
            with suppress(FetchError):  # the numbers are gated, the commit is not
                known = known.at(resolve(wanted.repo, wanted.revision, token=token))
        return known, f"{error.cause}; planned with the built-in numbers"
