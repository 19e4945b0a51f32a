"""Where a model's numbers are from: files on this machine, the Hub, or the table that is built in."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deploy.nodes.config import ModelConfig
from deploy.planning import architectures
from deploy.planning.architectures import ARCHITECTURES
from deploy.planning.shapes import COMMIT, Model, Stored
from deploy.planning.tensors import Tensor
from deploy.remote import checkpoint
from deploy.remote.wire import Json, WorkerError
from gracefarm.errors import ConfigError, FetchError, LayoutError

if TYPE_CHECKING:
    import httpx

ENDPOINT = "https://huggingface.co"
TIMEOUT = 10.0
WHOLE = "is it the model's own config.json, and all of it?"
TRUST = "serve it without a prediction: [layout] trust = true, with tensor_parallel and pipeline_parallel"


class GatedError(FetchError):
    """The Hub has it and does not give its files."""


class UnknownModelError(LayoutError):
    """An architecture or a quantisation whose bytes are not known here; `[layout] trust` serves it all the same."""


def from_config(config: object, *, repo: str, revision: str, source: str) -> Model:
    """The model of a config.json.

    Raises:
        UnknownModelError: its architecture or quantisation is not known here: its bytes would be guessed.
        ConfigError: a number is missing or no number.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: config.json is a {type(config).__name__}, not a table", remedy=WHOLE)
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "none named"
    if name not in ARCHITECTURES:
        raise UnknownModelError(
            f"{repo}: the planner does not know the architecture {name}, so that it would guess its memory", remedy=TRUST
        )
    try:
        return architectures.model_of(name, config, repo=repo, revision=revision, source=source)
    except KeyError as error:
        raise ConfigError(f"{source}: config.json has no {error.args[0]}", remedy=WHOLE) from error
    except NotImplementedError as error:
        raise UnknownModelError(
            f"{repo}: its weights are quantised as {error}, which the planner does not know", remedy=TRUST
        ) from error
    except ValidationError as error:
        wrong = error.errors()[0]
        what = ".".join(map(str, wrong["loc"])) or "together"
        raise ConfigError(f"{source}: config.json has wrong numbers: {what}: {wrong['msg']}", remedy=WHOLE) from error
    except (ValueError, TypeError, ZeroDivisionError, AttributeError, IndexError) as error:
        raise ConfigError(f"{source}: config.json has wrong numbers: {error}", remedy=WHOLE) from error


def from_file(path: Path, *, repo: str, revision: str) -> Model:
    """The model of a local config.json, or of the folder that has it with its weights or their index.

    Raises:
        ConfigError: a file is missing, damaged, or about another model. UnknownModelError: as `from_config`.
    """
    place = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(place.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{place}: no such file", remedy="[model] config names a config.json") from error
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}", remedy="is it the whole file?") from error
    model = from_config(config, repo=repo, revision=revision, source=str(path))
    if not path.is_dir():
        return model
    try:
        index = checkpoint.names(path)
        if index is not None and not any((path / shard).exists() for shard in index.values()):
            return _named(model, index)
        return with_tensors(model, checkpoint.read({"folder": str(path)}))
    except WorkerError as error:
        raise ConfigError(error.cause, remedy=error.remedy) from error
    except OSError as error:
        raise ConfigError(f"{path}: {error}", remedy="make the files readable") from error


def _named(model: Model, index: Mapping[str, str]) -> Model:
    """The model, whose index names every tensor that its config.json implies. Raises ConfigError."""
    there = {checkpoint.folded(name) for name in index}
    for layer in range(model.layers):
        for tensor in architectures.layer_tensors(model, layer):
            if not tensor.scale and (layer, tensor.name) not in there:
                raise ConfigError(
                    f"{model.source}: the index names no {tensor.name} in layer {layer}, which config.json implies",
                    remedy="are both of the same model?",
                )
    return model


def with_tensors(model: Model, found: Json) -> Model:
    """The model with the tensors that `deploy.remote.checkpoint.read` found in its files.

    Raises:
        ConfigError: they are another model's than config.json's.
    """
    if not found:
        return model

    def tensors(entries: list[list[Any]]) -> tuple[Tensor, ...]:
        return tuple(Tensor(name=name, dtype=dtype, shape=tuple(shape), count=count) for name, dtype, shape, count in entries)

    stored = Stored(
        kinds=tuple(tensors(kind) for kind in found["kinds"]),
        order=tuple(found["order"]),
        outer=tensors(found["outer"]),
        other=found["other"],
    )
    if len(stored.order) < model.layers:  # more of them: layers that predict several tokens, which stay unloaded
        raise ConfigError(
            f"{model.source}: the files have {len(stored.order)} layers, and config.json says {model.layers}",
            remedy="are both of the same model?",
        )
    for layer in range(model.layers):
        _compare(model, layer, {tensor.name: tensor for tensor in stored.kinds[stored.order[layer]]})
    return model.model_copy(update={"stored": stored})


def _compare(model: Model, layer: int, there: Mapping[str, Tensor]) -> None:
    """Every matrix that config.json implies is there and as large. Raises ConfigError."""
    for tensor in architectures.layer_tensors(model, layer):
        found = there.get(tensor.name)
        if not tensor.scale and (found is None or (found.shape, found.count) != (tensor.shape, tensor.count)):
            has = f"{found.count} x {list(found.shape)}" if found else "none"
            raise ConfigError(
                f"{model.source}: by config.json, layer {layer} has {tensor.count} x {tensor.name} {list(tensor.shape)}, "
                f"and the files have {has}",
                remedy="are both of the same model?",
            )


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
