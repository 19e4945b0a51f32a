"""The storage of quantised weights: which tensors a checkpoint has for one matrix, for each method.

The formats are those of vLLM 0.26.0 (model_executor/layers/quantization in its wheel): fp8.py, fbgemm_fp8.py, auto_awq.py,
auto_gptq.py, modelopt.py, mxfp4.py, compressed_tensors/.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deploy.planning.shapes import Quantization
from deploy.planning.tensors import Tensor

NVFP4_GROUP = 16
MXFP4_GROUP = 32
_NVFP4_OF_COMPRESSED = ("weight_packed", "weight_global_scale", "input_global_scale")
LEAST_SM: Mapping[str, int] = MappingProxyType(
    {"fp8": 75, "modelopt FP8": 89, "fbgemm_fp8": 80, "int": 75, "awq": 75, "gptq": 60, "mxfp4": 80, "nvfp4": 75}
)
"Lowest compute capability of a method in vLLM 0.26.0 (get_min_capability). NVFP4 runs on Hopper too, with Marlin."


def linear(quantization: Quantization | None, module: str, rows: int, columns: int, *, count: int = 1) -> tuple[Tensor, ...]:
    """The tensors of `count` weight matrices with `rows` outputs and `columns` inputs."""

    def tensor(name: str, dtype: str, *shape: int) -> Tensor:
        return Tensor(name=f"{module}.{name}", shape=shape, dtype=dtype, count=count)

    if quantization is None:
        return (tensor("weight", "BF16", rows, columns),)
    group = quantization.group or columns
    packed = columns * quantization.bits // 32
    match quantization.method:
        case "fp8" if quantization.block:
            high, wide = quantization.block
            return (
                tensor("weight", "F8_E4M3", rows, columns),
                tensor("weight_scale_inv", "F32", -(-rows // high), -(-columns // wide)),
            )
        case "fp8" | "fbgemm_fp8":
            scale = (rows, 1) if quantization.per_row or quantization.method == "fbgemm_fp8" else (1,)
            return (tensor("weight", "F8_E4M3", rows, columns), tensor("weight_scale", "F32", *scale))
        case "int":
            return (
                tensor("weight_packed", "I32", rows, packed),
                tensor("weight_scale", "BF16", rows, columns // group),
                tensor("weight_shape", "I64", 2),
            )
        case "awq":
            across = rows * quantization.bits // 32
            return (
                tensor("qweight", "I32", columns, across),
                tensor("qzeros", "I32", columns // group, across),
                tensor("scales", "F16", columns // group, rows),
            )
        case "gptq":
            return (
                tensor("qweight", "I32", packed, rows),
                tensor("qzeros", "I32", columns // group, rows * quantization.bits // 32),
                tensor("scales", "F16", columns // group, rows),
                tensor("g_idx", "I32", columns),
            )
        case "nvfp4":
            of_nvidia = quantization.name.startswith("modelopt")
            weight, second, third = ("weight", "weight_scale_2", "input_scale") if of_nvidia else _NVFP4_OF_COMPRESSED
            return (
                tensor(weight, "U8", rows, columns // 2),
                tensor("weight_scale", "F8_E4M3", rows, columns // NVFP4_GROUP),
                tensor(second, "F32", 1),
                tensor(third, "F32", 1),
            )
        case "mxfp4":  # only for experts, which are one tensor: deploy/planning/architectures.py
            return (tensor("weight", "BF16", rows, columns),)
    raise AssertionError(quantization.method)


def least_sm(quantization: Quantization) -> int:
    """The lowest compute capability for these weights, without the point."""
    return LEAST_SM.get(quantization.name, LEAST_SM[quantization.method])


def ignores(quantization: Quantization, module: str) -> bool:
    """Whether a module with this full name is not quantised."""
    for entry in quantization.ignored:
        if entry.startswith("re:"):
            if re.match(entry[3:], module):
                return True
        elif "*" in entry:
            if fnmatch.fnmatchcase(module, entry) or fnmatch.fnmatchcase(module, entry + ".*"):
                return True
        elif module == entry or module.startswith(entry + "."):
            return True
    return False


def of_config(config: Mapping[str, Any]) -> Quantization | str | None:
    """The quantisation of the values of `configjson.checked`.

    A string is the name of an unknown method; None: the weights are not quantised.
    """
    table = config.get("quantization_config") or config.get("compression_config")
    if not table:
        return None
    name: str = table.get("quant_method", "unknown")
    ignored = tuple(table.get("modules_to_not_convert") or table.get("ignore") or table.get("exclude_modules") or ())
    match name:
        case "fp8":
            block = table.get("weight_block_size")
            return Quantization(method="fp8", name=name, block=tuple(block) if block else None, ignored=ignored)
        case "fbgemm_fp8":
            return Quantization(method="fbgemm_fp8", name=name, per_row=True, ignored=ignored)
        case "awq" | "gptq":
            group = table.get("group_size", -1)
            return Quantization(
                method="awq" if name == "awq" else "gptq",
                name=name,
                bits=table.get("bits", 4),
                group=None if group < 0 else group,
                ignored=ignored,
            )
        case "mxfp4":
            return Quantization(method="mxfp4", name=name, bits=4, group=MXFP4_GROUP, ignored=ignored)
        case "modelopt" | "modelopt_fp4":
            return _modelopt(table, ignored)
        case "compressed-tensors":
            return _compressed(table, ignored)
    return name


def _modelopt(table: Mapping[str, Any], ignored: tuple[str, ...]) -> Quantization | str:
    algorithm: str = table.get("quant_algo", table.get("quantization", {}).get("quant_algo", "unknown"))
    match algorithm:
        case "NVFP4":
            return Quantization(method="nvfp4", name="modelopt NVFP4", bits=4, group=NVFP4_GROUP, ignored=ignored)
        case "FP8":
            return Quantization(method="fp8", name="modelopt FP8", ignored=ignored)
    return f"modelopt {algorithm}"


def _compressed(table: Mapping[str, Any], ignored: tuple[str, ...]) -> Quantization | str:
    groups = list(table.get("config_groups", {}).values())
    weights = groups[0].get("weights", {}) if len(groups) == 1 else {}
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    name, form = "compressed-tensors", table.get("format", "unknown")
    if form == "pack-quantized" and kind == "int" and bits in (4, 8):
        return Quantization(method="int", name=name, bits=bits, group=weights.get("group_size"), ignored=ignored)
    if form == "nvfp4-pack-quantized":
        return Quantization(method="nvfp4", name=name, bits=4, group=NVFP4_GROUP, ignored=ignored)
    fp8 = form in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8  # both are stored alike
    if fp8 and strategy in ("tensor", "channel", "block"):
        block = weights.get("block_structure") if strategy == "block" else None
        return Quantization(
            method="fp8", name=name, block=tuple(block) if block else None, per_row=strategy == "channel", ignored=ignored
        )
    return f"{name} {form}, {bits} bits, {strategy}"
