"""The audit of device code: variant labels and cubins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from builder import audit
from builder.proof import embed
from gracefarm import variants
from gracefarm.errors import WheelError
from tests import audit_kit
from tests.audit_kit import failed, module
from tests.integration.gates_kit import Bench, bench, by_gate, cu130, cuda_draft, draft

__all__ = ["bench", "cu130"]


@pytest.mark.parametrize(
    ("sms", "label", "architectures"),
    [
        (("90",), "cu130_sm90", ["90_real"]),
        (("90", "100"), "cu130_sm90_sm100", ["90_real", "100_real"]),
        (("90a",), "cu130_sm90a", ["90_real"]),
        (("100f",), "cu130_sm100f", ["100_real"]),
        (("90", "90+ptx"), "cu130_sm90_ptx90", ["90_real", "90_virtual"]),
    ],
)
def test_a_label_says_what_is_measured(
    bench: Bench, tmp_path: Path, sms: tuple[str, ...], label: str, architectures: list[str]
) -> None:
    plain = cuda_draft(bench, *sms).pack(tmp_path)
    real = tuple(sm for sm in sms if "ptx" not in sm)
    policy = dataclasses.replace(bench.policy, sm=real, ptx="90" if len(real) < len(sms) else None)
    wheel = embed.label(plain, policy, 1_700_000_000, tmp_path / "labelled")
    assert wheel.name == plain.name.replace(".whl", f"-{label}.whl")
    said = variants.parse(audit_kit.member(wheel, "demo-1.0+cu130.dist-info/variant.json"), label)
    assert said.properties == {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": architectures}}
    verdicts = audit.audit(wheel, policy)
    assert failed(verdicts) == []
    assert by_gate(verdicts)["variant"].status == "passed"


def test_a_wheel_without_cuda_is_the_variant_that_every_machine_may_take(bench: Bench, tmp_path: Path) -> None:
    plain = draft(bench.core("plain.so", module())).pack(tmp_path)
    wheel = embed.label(plain, bench.policy, 1_700_000_000, tmp_path / "labelled")
    assert wheel.name.endswith("-null.whl")
    assert failed(audit.audit(wheel, bench.policy)) == []


def test_code_for_one_device_alone_cannot_be_labelled(bench: Bench, tmp_path: Path) -> None:
    """100_real would be taken for 10.3 too, which sm_100a does not run on."""
    plain = cuda_draft(bench, "100a").pack(tmp_path)
    with pytest.raises(WheelError, match="sm_100a runs only on that device"):
        embed.label(plain, bench.policy, 1_700_000_000, tmp_path / "labelled")


def test_cubins_as_asked_pass_and_are_counted(bench: Bench, tmp_path: Path) -> None:
    wheel = cuda_draft(bench, "90").pack(tmp_path)
    verdict = by_gate(audit.audit(wheel, bench.policy))["cubins"]
    assert verdict.status == "passed"
    assert verdict.details == ("demo/kernels.so: 1 for sm_90",)


def test_an_extra_sm_counts_when_the_recipe_declares_it_and_must_then_be_there(bench: Bench, tmp_path: Path) -> None:
    both = cuda_draft(bench, "90", "100").pack(tmp_path / "both")
    plain = cuda_draft(bench, "90").pack(tmp_path / "plain")
    policy = dataclasses.replace(bench.policy, sm_extra={"hopper/*.cu": ("100",)})
    assert failed(audit.audit(both, policy)) == []
    verdicts = audit.audit(plain, policy)
    assert failed(verdicts) == ["cubins"]
    assert "but no object has a cubin for it" in by_gate(verdicts)["cubins"].summary


def test_a_cuda_recipe_without_device_code_and_a_plain_one_with_it_are_refused(bench: Bench, tmp_path: Path) -> None:
    without = draft(bench.core("plain.so", module())).pack(tmp_path / "without")
    with_code = cuda_draft(bench, "90").pack(tmp_path / "with")
    assert failed(audit.audit(without, dataclasses.replace(bench.policy, needs_cubins=True))) == ["cubins"]
    verdicts = audit.audit(with_code, dataclasses.replace(bench.policy, sm=None))
    assert failed(verdicts) == ["cubins"]
    assert "the recipe has cuda = false" in by_gate(verdicts)["cubins"].summary


def test_device_code_that_cuobjdump_cannot_read_is_refused(bench: Bench, tmp_path: Path) -> None:
    one = cuda_draft(bench, "90")
    data = bytearray(one.files["demo/kernels.so"])
    at = data.index(bytes.fromhex("50ed55ba"))  # the fatbin's magic
    data[at : at + 64] = b"\xff" * 64
    one.files["demo/kernels.so"] = bytes(data)
    verdicts = audit.audit(one.pack(tmp_path), bench.policy)
    assert "cubins" in failed(verdicts)
