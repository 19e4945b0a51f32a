"""Reads the headers of a model's safetensors files: names, types and shapes, but no weights.

The format: 8 bytes of little-endian length, this number of bytes of JSON, then the data (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

from deploy.remote.wire import Json, WorkerError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST = 100_000_000
"Maximum bytes of a header in this format."
BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64"), 64),
        **dict.fromkeys(("F32", "I32", "U32"), 32),
        **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
        "F4": 4,
    }
)
"Bits of one element by the format's type names."
_LAYER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d{1,9})\.(.+)")
_OUTER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?(embed_tokens|norm|lm_head)\.weight")
_NO_INDEX = "it is not an index of safetensors files"
_NO_HEADER = "it is not a safetensors file: its header cannot be read"
_EXPERT = re.compile(r"\bexperts\.\d+\.")

Entry = tuple[str, str, tuple[int, ...]]
"Name, type, shape."


def read(request: Json) -> Json:
    """Read the headers of the files in `folder`. Equal layers are returned once, and experts are counted.

    Returns:
        The tensors; empty if no file is in the format safetensors.

    Raises:
        WorkerError: a file is missing, or a header does not match its file.
    """
    folder = Path(request["folder"])
    index = names(folder)
    if index is None and not (folder / SINGLE).exists():
        return {}
    layers: dict[int, Counter[Entry]] = {}
    outer: list[Entry] = []
    other = 0
    unread = dict(index or {})
    for shard in shards(folder, index):
        for name, dtype, shape in header(folder / shard):
            if index is not None and unread.pop(name, None) != shard:
                raise _wrong(
                    folder / shard, f"it contains the tensor {name}, but {INDEX} does not list this tensor for this file"
                )
            if place := folded(name):
                layers.setdefault(place[0], Counter())[place[1], dtype, shape] += 1
            elif match := _OUTER.fullmatch(name):
                outer.append((f"{match[1]}.weight", dtype, shape))
            else:
                other += math.prod(shape) * BITS[dtype] // 8
    for name, shard in unread.items():
        raise _wrong(
            folder / shard, f"{INDEX} lists the tensor {name} for this file, but the file does not contain this tensor"
        )
    return {**_told_once(layers), "outer": [(*entry, 1) for entry in outer], "other": other}


def _told_once(layers: dict[int, Counter[Entry]]) -> Json:
    kinds: list[list[tuple[str, str, tuple[int, ...], int]]] = []
    order = []
    for number in range(len(layers)):
        if number not in layers:
            raise WorkerError(
                "fetch",
                f"the files have {len(layers)} layers, but layer {number} is missing",
                "check the files with `deploy weights verify`",
            )
        kind = sorted((*entry, count) for entry, count in layers[number].items())
        if kind not in kinds:
            kinds.append(kind)
        order.append(kinds.index(kind))
    return {"kinds": kinds, "order": order}


def folded(name: str) -> tuple[int, str] | None:
    """Layer and name of a tensor within the layer, with `*` for the number of an expert; None: it is not in a layer."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), _EXPERT.sub("experts.*.", match[2])) if match else None


def names(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, from the index; None: there is no index.

    Raises:
        WorkerError: the index is damaged.
    """
    path = folder / INDEX
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _wrong(path, _NO_INDEX) from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict):
        raise _wrong(path, _NO_INDEX)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _wrong(path, f"{_NO_INDEX}: the file of {name} is {_shown(shard)} instead of a name")
    return weight_map


def shards(folder: Path, index: dict[str, str] | None) -> tuple[str, ...]:
    """The files. Raises WorkerError if some files of the index are missing, or there are no files."""
    wanted = tuple(sorted(set(index.values()))) if index is not None else (SINGLE,)
    if outside := [shard for shard in wanted if "/" in shard or shard.startswith(".")]:
        raise _wrong(folder / INDEX, f"it lists {outside[0]}, which is outside of the folder")
    missing = [shard for shard in wanted if not (folder / shard).is_file()]
    if missing:
        raise WorkerError(
            "fetch",
            f"{folder}: {len(missing)} of {len(wanted)} files are missing, such as {missing[0]}",
            "download the missing files with `deploy up --from weights`",
        )
    return wanted


def header(path: Path) -> Iterator[Entry]:
    """The tensors of one file. Raises WorkerError if the header does not match the file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(LONGEST, size - 8):
            raise _wrong(path, "it is shorter than its header")
        entries = _entries(path, stream.read(length))
    place = 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if begin != place or end - begin != -(-math.prod(shape) * BITS[dtype] // 8):
            raise _wrong(
                path,
                f"the header places {name} at {begin} to {end}; this does not match the shape or the neighbours of the tensor",
            )
        place = end
        yield name, dtype, shape
    if place != size - 8 - length:
        raise _wrong(path, f"its tensors end at byte {8 + length + place}, but the file has {size} bytes")


def _entries(path: Path, text: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, type, shape, begin and end of each tensor in a header. Raises WorkerError if a value has the wrong type."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, _NO_HEADER) from error
    if not isinstance(table, dict):
        raise _wrong(path, _NO_HEADER)
    entries = []
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise _wrong(path, f"{name} is {_shown(entry)} in the header instead of a JSON object")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in BITS:
            raise _wrong(path, f"{name} has the unknown type {dtype if isinstance(dtype, str) else _shown(dtype)}")
        if not _integers(shape) or min(shape, default=0) < 0:
            raise _wrong(path, f"{name} has the impossible shape {_shown(shape)}")
        if not _integers(offsets) or len(offsets) != 2:
            raise _wrong(path, f"{name} has the data_offsets {_shown(offsets)} instead of two numbers")
        entries.append((name, dtype, tuple(shape), offsets[0], offsets[1]))
    return entries


def _integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(element) is int for element in value)


def _shown(value: object) -> str:
    return json.dumps(value)[:60]


def _wrong(path: Path, cause: str) -> WorkerError:
    return WorkerError("fetch", f"{path}: {cause}", "run `deploy weights verify --remove`, then `deploy up`")
