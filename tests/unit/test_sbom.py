"""The SBOM of every committed recipe is SPDX, names each pinned source, and can be made again from what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from builder.planning import recipe, stack
from builder.planning.digests import FirstUse
from builder.planning.plan import Plan
from builder.planning.stack import Arch
from builder.proof import materials, sbom
from builder.toolchains import choice

REPOSITORY = Path(__file__).parent.parent.parent
EPOCH = 1_700_000_000


def planned(name: str) -> Plan:
    loaded = recipe.load(REPOSITORY / "recipes", name)
    return choice.make_plan(loaded, stack.load(REPOSITORY / "stacks", loaded.data.stack), stack.host_arch(), Arch.AARCH64)


@pytest.mark.parametrize("name", recipe.names(REPOSITORY / "recipes"))
def test_every_recipes_sbom_is_valid_and_complete(name: str, tmp_path: Path) -> None:
    made = planned(name)
    text = sbom.of(made, EPOCH, made.recipe.data.version)
    place = tmp_path / "sbom.spdx.json"
    place.write_text(text)
    document = parse_file(str(place))
    assert [problem.validation_message for problem in validate_full_spdx_document(document)] == []
    for material in materials.of(made.inputs):
        if material.digest:
            assert material.digest in text, material
    for bundled in made.recipe.data.wheel.bundled:
        assert bundled.path in {package.name for package in document.packages}
    inputs = json.loads(json.dumps(made.inputs))
    build_id, besides = sbom.read(text)
    assert build_id == made.build_id
    assert sbom.render(inputs, besides) == text


def test_each_part_of_the_source_has_its_licence_and_a_digest_of_a_first_use_says_so() -> None:
    made = planned("triton")
    date = "2026-11-29"
    first_use = FirstUse.model_validate({"date": date, "url": "https://far.invalid/include.zip"})
    files = [file.model_copy(update={"accepted": first_use}) if file.sha256 else file for file in made.recipe.data.files]
    bare = [file.model_copy(update={"witness": ()}) for file in files]
    for changed, unconfirmed in ((files, 5), (bare, 6)):
        data = made.recipe.data.model_copy(update={"files": tuple(changed)})
        again = replace(made, recipe=replace(made.recipe, data=data))
        assert again.build_id != made.build_id, "the wheel carries the SBOM, and that says so"
        text = sbom.of(again, EPOCH, again.recipe.data.version)
        comments = [package.get("comment") for package in json.loads(text)["packages"]]
        assert comments.count(f"digest read at first use on {date}, not confirmed") == unconfirmed, "json has a witness"
        assert sbom.render(json.loads(json.dumps(again.inputs)), sbom.read(text)[1]) == text
    packages = {package["name"]: package for package in json.loads(text)["packages"]}
    assert packages["seed/.triton/llvm"]["licenseDeclared"] == "Apache-2.0 WITH LLVM-exception"
    assert packages["seed/.triton/json"]["licenseDeclared"] == "MIT"
    source = planned("flash_attn")
    packages = {package["name"]: package for package in json.loads(sbom.of(source, EPOCH, "1.0"))["packages"]}
    assert packages["csrc/cutlass"]["licenseDeclared"] == "BSD-3-Clause"


def test_a_document_of_a_time_without_licences_is_made_again_as_it_was() -> None:
    made = planned("flash_attn")
    inputs = json.loads(json.dumps(made.inputs))
    del inputs["recipe"]["licenses"]
    del inputs["recipe"]["source"]["submodules"]["csrc/cutlass"]["license"]
    text = sbom.render(inputs, sbom.read(sbom.of(made, EPOCH, made.recipe.data.version))[1])
    sources = [package for package in json.loads(text)["packages"] if package["SPDXID"].startswith("SPDXRef-source-")]
    assert {package["licenseDeclared"] for package in sources} == {"NOASSERTION"}
    assert sbom.render(inputs, sbom.read(text)[1]) == text


def test_the_time_of_the_document_is_the_sources() -> None:
    assert '"created": "2023-11-14T22:13:20Z"' in sbom.of(planned("causal_conv1d"), EPOCH, "1.0")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"packages": [{}]}', '{"packages": 1}'])
def test_what_is_no_sbom_of_ours_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"SBOM|JSON|Expecting"):
        sbom.read(text)
