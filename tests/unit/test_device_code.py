"""Architectures of a cell: how a command line chooses them, what is refused, and what torch and CMake are told."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from builder.data.toolchain import schedule
from builder.planning import device_code, recipe, stack
from builder.planning.plan import Plan
from builder.planning.stack import Arch
from builder.toolchains import choice
from builder.toolchains.choice import ToolchainChoice
from builder.toolchains.wrappers import command, variables
from gracefarm.errors import ConfigError, UsageError
from tests.conftest import REPOSITORY


def plan(
    name: str = "causal_conv1d", on: str = "cu130", sm: str | None = None, ptx: str | None = None, **wheel: object
) -> Plan:
    """The plan of a committed recipe against a committed stack, with other values under [wheel]."""
    loaded = recipe.load(REPOSITORY / "recipes", name)
    wheel = {"sm_supported": ()} | wheel
    data = loaded.data.model_copy(update={"wheel": loaded.data.wheel.model_copy(update=wheel)})
    cell = replace(
        stack.load(REPOSITORY / "stacks", on), asked_sm=device_code.parse(sm) if sm is not None else None, asked_ptx=ptx
    )
    return choice.make_plan(replace(loaded, data=data), cell, Arch.X86_64, Arch.AARCH64)


@pytest.mark.parametrize(
    ("text", "values"),
    [("90", ("90",)), ("120+90+100f", ("90", "100f", "120")), ("90a+90+90", ("90", "90a"))],
)
def test_a_list_of_architectures_is_joined_with_plus(text: str, values: tuple[str, ...]) -> None:
    assert device_code.parse(text) == values


@pytest.mark.parametrize("text", ["", "90,100", "9.0", "sm_90", "90+", "90x", "90..120"])
def test_what_is_no_list_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not an architecture.*") as refused:
        device_code.parse(text)
    assert "90+100" in (refused.value.remedy or "")


@pytest.mark.parametrize("text", ["90a", "x", "9.0", ""])
def test_ptx_for_one_capability_alone_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        device_code.parse_ptx(text)


def test_the_cells_architectures_enter_the_plan_in_place_of_the_stacks() -> None:
    own, other = plan(), plan(sm="100f+90")
    assert own.inputs["stack"]["sm"] == ["90"]  # type: ignore[index]
    assert other.inputs["stack"]["sm"] == ["100f", "90"]  # type: ignore[index]
    assert other.build_id != own.build_id == plan(sm="90").build_id
    assert other.repeat == "builder build causal_conv1d --stack cu130 --target aarch64 --sm 90+100f"
    assert plan(ptx="90").build_id != own.build_id
    set_by = variables(other, jobs=1, epoch=0)
    assert (set_by["GRACEFARM_SM"], set_by["TORCH_CUDA_ARCH_LIST"]) == ("90 100f", "9.0 10.0")
    assert set_by["GRACEFARM_CMAKE_SM"] == "90-real;100-real"


def test_a_wheel_without_device_code_is_the_same_for_all_architectures() -> None:
    assert plan("triton", "cu124", sm="90").build_id == plan("triton", "cu124", sm="80", ptx="80").build_id


@pytest.mark.parametrize(
    ("asked", "of_recipe", "of_stack", "ptx"),
    [
        (None, None, None, None),
        (None, None, "80", "80"),
        (None, "90", "80", "90"),
        ("100", "90", "80", "100"),
        ("none", "90", "80", None),
        (None, "none", "80", None),
    ],
)
def test_ptx_is_the_command_lines_or_the_recipes_or_the_stacks(
    asked: str | None, of_recipe: str | None, of_stack: str | None, ptx: str | None
) -> None:
    made = plan(ptx=asked)
    base = replace(made.stack, data=made.stack.data.model_copy(update={"ptx": of_stack}))
    data = made.recipe.data
    data = data.model_copy(update={"wheel": data.wheel.model_copy(update={"ptx": of_recipe})})
    assert replace(made, stack=base, recipe=replace(made.recipe, data=data)).ptx == ptx


@pytest.mark.parametrize(
    ("options", "sentence", "remedy"),
    [
        ({"sm": "91"}, "CUDA 13.0 of stack cu130 does not compile for sm_91", "did you mean '90'"),
        (
            {"name": "flash_attn", "on": "cu124", "sm": "100"},
            "CUDA 12.4 of stack cu124 does not compile for sm_100",
            "nearest",
        ),
        ({"sm": "70"}, "CUDA 13.0 of stack cu130 does not compile for sm_70", ""),
        ({"sm": "88"}, "torch 2.11.0 of stack cu130 does not support sm_88", "remove this architecture from"),
        ({"sm": "100+100f"}, "sm_100 and sm_100f cannot be in one wheel", "sm_100f"),
        ({"ptx": "91"}, "does not compile for sm_91", ""),
        ({"sm_extra": {"*.cu": ("90f",)}}, "does not compile for sm_90f", ""),
        (
            {"sm": "75", "sm_supported": ("80", "90")},
            "causal_conv1d does not support sm_75: its recipe lists 80, 90",
            "if the source supports sm_75, add 75 to",
        ),
    ],
)
def test_an_architecture_that_cuda_torch_or_the_recipe_does_not_know_is_refused(
    options: dict[str, str], sentence: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(**options)
    assert sentence in refused.value.cause
    assert remedy.replace("nearest", "") in (refused.value.remedy or "")


def test_a_recipe_without_device_code_asks_nothing_of_the_architectures() -> None:
    assert plan("triton", "cu124", sm="121").stack.sm == ("121",)


def test_the_choice_of_a_command_line_reaches_the_plan() -> None:
    loaded, base = recipe.load(REPOSITORY / "recipes", "causal_conv1d"), stack.load(REPOSITORY / "stacks", "cu130")
    made = ToolchainChoice(sm=("90", "100"), ptx="90").plan(loaded, base, Arch.AARCH64)
    assert (made.stack.sm, made.ptx) == (("90", "100"), "90")


@pytest.mark.parametrize(
    ("source", "hopper", "memory"),
    [
        ("build/temp/kernels/quantization/machete/generated/machete_mm_impl_part3.cu", True, "9.5GiB"),
        ("build/temp/kernels/quantization/machete/generated/machete_prepack_part1.cu", True, None),
        ("kernels/quantization/machete/machete_pytorch.cu", False, None),
        ("kernels/quantization/cutlass_w8a8/scaled_mm_c3x.cu", True, "8GiB"),
        ("kernels/quantization/gptq_marlin/gptq_marlin.cu", False, "4.5GiB"),
        ("kernels/attention/attention_kernels.cu", False, None),
    ],
)
def test_the_engines_tables_name_what_upstream_compiles_for_90a(source: str, hopper: bool, memory: str | None) -> None:
    data = recipe.load(REPOSITORY / "recipes", "aphrodite").data
    assert any(schedule.named(source, glob) for glob in data.wheel.sm_extra) is hopper
    assert [size for glob, size in data.build.unit_memory.items() if schedule.named(source, glob)] == [memory] * bool(memory)


@pytest.mark.parametrize(
    ("sm", "torch", "cmake"),
    [
        (("90",), "9.0", "90-real"),
        (("90a",), "9.0a", "90a-real"),
        (("75", "90", "90a", "100f", "120"), "7.5 9.0 9.0a 10.0 12.0", "75-real;90-real;90a-real;100-real;120-real"),
        (("100", "100f"), "10.0", "100-real"),
        (("103a", "121f"), "10.3a 12.1", "103a-real;121-real"),
    ],
)
def test_torch_and_cmake_get_names_that_they_know(sm: tuple[str, ...], torch: str, cmake: str) -> None:
    assert (device_code.torch_list(sm), device_code.cmake_list(sm)) == (torch, cmake)


def with_build(sm: str | None = None, **build: object) -> Plan:
    """The plan of a committed recipe with other values under [build]."""
    made = plan(sm=sm)
    table = made.recipe.data.build.model_dump() | build
    data = made.recipe.data.model_copy(update={"build": recipe.Build.model_validate(table)})
    return replace(made, recipe=replace(made.recipe, data=data))


def test_the_cells_architectures_reach_packages_that_have_a_variable_of_their_own() -> None:
    environment = {
        "NATTEN_CUDA_ARCH": "{sm_dotted}",
        "FLASH_ATTN_CUDA_ARCHS": "{sm}",
        "NVCC_GENCODE": "{sm_gencode} -O2",
        "KEPT": '{"sm": 1} {smoke}',
    }
    made = with_build(sm="90+100f", environment=environment, config_settings={"archs": "{sm}"}, cmake={"ARCHS": "{sm}"})
    values = variables(made, jobs=1, epoch=0)
    assert values["NATTEN_CUDA_ARCH"] == "9.0;10.0"
    assert values["FLASH_ATTN_CUDA_ARCHS"] == "90;100f"
    assert values["NVCC_GENCODE"] == ("-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_100f,code=sm_100f -O2")
    assert values["KEPT"] == '{"sm": 1} {smoke}'
    assert values["GRACEFARM_CMAKE"] == "ARCHS=90;100f"
    assert "-Carchs=90;100f" in command(made)
    assert made.build_id != with_build(sm="90", environment=environment).build_id


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            {"environment": {"A": "{sm_doted}"}},
            "the value of A has the unknown placeholder {sm_doted}: did you mean '{sm_dotted}'?",
        ),
        ({"cmake": {"A": "{sm}"}, "cuda": False}, "the placeholder {sm}, but a recipe with cuda = false has no architectures"),
    ],
)
def test_a_placeholder_that_means_nothing_is_refused(build: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        recipe.Build.model_validate(build)


@pytest.mark.parametrize(
    ("bad", "sm", "refused"),
    [
        ({"sm": ("103",), "cuda": ">=13"}, "103", True),
        ({"sm": ("103",), "cuda": ">=13"}, "90+103a", True),
        ({"sm": ("103",), "cuda": ">=13"}, "100", False),
        ({"sm": ("103",), "cuda": "<13"}, "103", False),
        ({"torch": "<2.12"}, "90", True),
        ({"torch": ">=2.12"}, "90", False),
        ({}, "90", True),
    ],
)
def test_a_combination_that_is_known_to_be_bad_is_refused_with_its_link(
    bad: dict[str, object], sm: str, refused: bool
) -> None:
    known = recipe.KnownBad.model_validate({"reason": "wrong numbers", "link": "https://example.org/issues/7", **bad})
    loaded = recipe.load(REPOSITORY / "recipes", "causal_conv1d")
    wheel = loaded.data.wheel.model_copy(update={"sm_supported": ()})
    loaded = replace(loaded, data=loaded.data.model_copy(update={"known_bad": (known,), "wheel": wheel}))
    cell = replace(stack.load(REPOSITORY / "stacks", "cu130"), asked_sm=device_code.parse(sm))
    if not refused:
        assert choice.make_plan(loaded, cell, Arch.X86_64, Arch.AARCH64).build_id
        return
    with pytest.raises(ConfigError, match=r"known to be bad: wrong numbers \(https://example.org/issues/7\)"):
        choice.make_plan(loaded, cell, Arch.X86_64, Arch.AARCH64)


def test_causal_conv1d_is_not_built_for_sm_103_with_cuda_13() -> None:
    with pytest.raises(ConfigError, match="causal-conv1d/issues/105"):
        plan(sm="103")
    assert plan(sm="100").build_id
