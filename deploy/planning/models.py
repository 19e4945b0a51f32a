"""Finds the dimensions of a model: in local files, on the Hub, or in the built-in table."""

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

from pydantic import BaseModel, ValidationError

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
SHOWN = 60
"Characters of a wrong value in a message."
WHOLE = "check that the file is the complete config.json of this model"
SAME = "check that config.json and the weights belong to the same model"
_HUB = "set the environment variable HF_ENDPOINT to the address of the Hub or of a mirror, or unset it"
TRUST = "to serve this model without a prediction, set trust = true, tensor_parallel and pipeline_parallel in [layout]"


class GatedError(FetchError):
    """The repository exists on the Hub, but its files are not accessible."""


class UnknownModelError(LayoutError):
    """The planner does not know the architecture or quantisation. `[layout] trust` serves the model anyway."""


def from_config(config: object, *, repo: str, revision: str, source: str) -> Model:
    """The model of a config.json.

    Raises:
        UnknownModelError: the architecture or quantisation is unknown, so that the memory cannot be computed.
        ConfigError: a number is missing or wrong.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: config.json contains a {type(config).__name__} instead of a JSON object", remedy=WHOLE)
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name not in ARCHITECTURES:
        why = f"the planner does not know the architecture {name}" if name else "config.json names no architecture"
        raise UnknownModelError(f"{repo}: {why}, so the memory cannot be computed", remedy=TRUST)
    try:
        return architectures.model_of(name, config, repo=repo, revision=revision, source=source)
    except KeyError as error:
        raise ConfigError(f"{source}: config.json has no {error.args[0]}", remedy=WHOLE) from error
    except NotImplementedError as error:
        raise UnknownModelError(
            f"{repo}: the planner does not know the quantisation {error} of the weights", remedy=TRUST
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{source}: config.json has {_wrong(error)}", remedy=WHOLE) from error


def _wrong(error: ValidationError) -> str:
    """The first wrong value, and what is right."""
    first = error.errors()[0]
    why = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping | BaseModel):  # several numbers do not fit
        return f"wrong numbers: {why}"
    where = ".".join(map(str, first["loc"]))
    return f"the wrong value {_shown(first['input'])} for {where}: {why}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def parsed(text: str, source: str, *, remedy: str = WHOLE) -> object:
    """The value of a JSON text. Raises ConfigError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{source}: its JSON is nested too deeply", remedy=remedy) from error
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON: {error}", remedy=remedy) from error


def from_file(path: Path, *, repo: str, revision: str) -> Model:
    """The model of a local config.json, or of a folder with config.json and the weights or their index.

    Raises:
        ConfigError: a file is missing, damaged, or of another model.
        UnknownModelError: as in `from_config`.
    """
    place = path / "config.json" if path.is_dir() else path
    try:
        config = parsed(place.read_text(), str(place))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{place}: no such file",
            remedy="correct --model, or config in [model] of deploy.toml; a folder of a model must contain config.json",
        ) from error
    except OSError as error:
        raise _unreadable(place, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not JSON: it is not text in UTF-8", remedy=WHOLE) from error
    model = from_config(config, repo=repo, revision=revision, source=str(path))
    if not path.is_dir():
        return model
    try:
        index = checkpoint.names(path)
        if index is not None and not any(path.glob("*.safetensors")):
            return _named(model, index)
        return with_tensors(model, checkpoint.read({"folder": str(path)}))
    except WorkerError as error:
        raise ConfigError(error.cause, remedy=error.remedy) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    place = error.filename or path
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{place}: you have no permission to read this file", remedy="give your user permission to read the model's files"
        )
    return ConfigError(
        f"{place} cannot be read: {error.strerror}",
        remedy="check that this path is a file of the model, and that its file system answers",
    )


def _named(model: Model, index: Mapping[str, str]) -> Model:
    """Check that the index has every tensor that config.json implies, and return the model. Raises ConfigError."""
    there = {checkpoint.folded(name) for name in index}
    for layer in range(model.layers):
        for tensor in architectures.layer_tensors(model, layer):
            if not tensor.scale and (layer, tensor.name) not in there:
                raise ConfigError(
                    f"{model.source}: config.json requires {tensor.name} of layer {layer}, but the index of the weights "
                    "does not have it",
                    remedy=SAME,
                )
    return model


def with_tensors(model: Model, contents: Json) -> Model:
    """The model with the tensors that `deploy.remote.checkpoint.read` found in its files.

    Raises:
        ConfigError: the tensors do not match config.json.
    """
    if not contents:
        return model

    def tensors(entries: list[list[Any]]) -> tuple[Tensor, ...]:
        return tuple(Tensor(name=name, dtype=dtype, shape=tuple(shape), count=count) for name, dtype, shape, count in entries)

    stored = Stored(
        kinds=tuple(tensors(kind) for kind in contents["kinds"]),
        order=tuple(contents["order"]),
        outer=tensors(contents["outer"]),
        other=contents["other"],
    )
    if len(stored.order) < model.layers:  # additional layers, which predict several tokens, are not loaded
        raise ConfigError(
            f"{model.source}: the files have {len(stored.order)} layers, but config.json has {model.layers}",
            remedy=SAME,
        )
    for layer in range(model.layers):
        _compare(model, layer, {tensor.name: tensor for tensor in stored.kinds[stored.order[layer]]})
    return model.model_copy(update={"stored": stored})


def _compare(model: Model, layer: int, there: Mapping[str, Tensor]) -> None:
    """Check that every matrix that config.json implies exists and has the same size. Raises ConfigError."""
    for tensor in architectures.layer_tensors(model, layer):
        stored = there.get(tensor.name)
        if not tensor.scale and (stored is None or (stored.shape, stored.count) != (tensor.shape, tensor.count)):
            has = f"{stored.count} x {list(stored.shape)}" if stored else "none"
            raise ConfigError(
                f"{model.source}: layer {layer} should have {tensor.count} x {tensor.name} {list(tensor.shape)} according to "
                f"config.json, but the files have {has}",
                remedy=SAME,
            )


@cache
def built_in_models() -> list[dict[str, Any]]:
    """The built-in models."""
    return list(tomllib.loads((resources.files("deploy") / "data" / "models.toml").read_text())["model"])


def built_in(repo: str, revision: str) -> Model | None:
    """A built-in model with this name, or None."""
    for entry in built_in_models():
        if repo in entry["names"]:
            return from_config(entry, repo=repo, revision=revision, source="built-in numbers")
    return None


def endpoint() -> str:
    """The URL of the Hub: HF_ENDPOINT, else the public one."""
    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def from_hub(repo: str, revision: str, *, token: str | None = None) -> Model:
    """The model on the Hub (HF_ENDPOINT), with its revision resolved to a commit.

    Raises:
        FetchError: the Hub cannot be reached, does not have the repository or revision, or the repository is gated.
    """
    commit = resolve(repo, revision, token=token)
    config = _ask(f"{repo}/resolve/{commit}/config.json", repo, revision, token)
    return from_config(config, repo=repo, revision=commit, source=f"{repo} on {endpoint()}")


def resolve(repo: str, revision: str, *, token: str | None = None) -> str:
    """The commit of a branch, tag or commit. This works for gated repositories too. Raises FetchError."""
    commit = str(_ask(f"api/models/{repo}/revision/{revision}", repo, revision, token).get("sha", ""))
    if not COMMIT.fullmatch(commit):
        raise FetchError(f"{endpoint()} does not answer like the Hugging Face Hub", remedy=_HUB)
    return commit


def _ask(path: str, repo: str, revision: str, token: str | None) -> dict[str, Any]:
    import httpx  # imported here: it takes a fifth of the start of a command, and few commands need it

    base = endpoint()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers) as client:
            answer = _get(client, f"{base}/{path}", repo, revision).json()
    except httpx.HTTPError as error:
        raise FetchError(
            f"{base} cannot be reached: {error or type(error).__name__}",
            remedy="check the network of this machine; or set the environment variable HF_ENDPOINT to a mirror; or set "
            "config in [model] of deploy.toml to a local config.json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise FetchError(f"{base} does not answer like the Hugging Face Hub", remedy=_HUB) from error
    return answer if isinstance(answer, dict) else {}


def _get(client: httpx.Client, url: str, repo: str, revision: str) -> httpx.Response:
    answer = client.get(url)
    if answer.status_code in (401, 403):
        raise GatedError(
            f"{repo} is gated or private (HTTP {answer.status_code} from the Hub)",
            remedy=f"accept its licence at {endpoint()}/{repo} and set HF_TOKEN in your shell; or set config in [model] of"
            " deploy.toml to a local config.json",
        )
    if answer.status_code == 404:
        raise FetchError(
            f"the Hub has no {repo} at revision {revision}",
            remedy="correct --model, or repo and revision in [model] of deploy.toml",
        )
    if answer.status_code != 200:
        raise FetchError(
            f"{url}: HTTP {answer.status_code}",
            remedy="try again later, or set the environment variable HF_ENDPOINT to a mirror",
        )
    return answer


def find(wanted: ModelConfig, base: Path, *, offline: bool = False) -> tuple[Model, str]:
    """Find the model of deploy.toml: in a local config.json, on the Hub unless `offline`, or in the built-in table.

    Returns:
        The model, and a note about the source for the user, which may be empty.

    Raises:
        FetchError: none of them has the model.
        ConfigError, LayoutError: as in `from_config`.
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
            with suppress(FetchError):  # config.json may be gated, but the commit is not
                known = known.at(resolve(wanted.repo, wanted.revision, token=token))
        return known, f"{error.cause}; the plan uses the built-in numbers"
