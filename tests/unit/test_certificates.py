"""What a certificate claims where a GPU can run code of several architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.planning.settings import load
from builder.proof import certificates, signing
from builder.proof.certificates import GpuReport
from builder.proof.record import BuiltFile, Record, now
from builder.smoke import ComparedResult

WHEEL = certificates.TestedWheel(filename="thing-1.0-py3-none-linux_x86_64.whl", sha256="ab" * 32)


@pytest.mark.parametrize(
    ("gpu", "digests", "others"),
    [
        ("90", {"90": "1" * 64, "90a": "2" * 64}, {"90": ("90a",), "90a": ("90",)}),
        ("90", {"90": "1" * 64, "80": "2" * 64}, {"90": ()}),
        ("89", {"80": "1" * 64, "86": "2" * 64}, {"86": ()}),
    ],
)
def test_a_certificate_names_the_other_code_that_the_gpu_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, digests: dict[str, str], others: dict[str, tuple[str, ...]]
) -> None:
    """A comparison may have run either code, so show and provenance do not claim that the certified code ran."""
    monkeypatch.setenv("GRACEFARM_SETTINGS", str(tmp_path / "settings.toml"))
    settings = load().model_copy(update={"home": tmp_path})
    signing.create()
    key = signing.private()
    assert key is not None
    given = GpuReport(
        wheel=WHEEL,
        device_digests=digests,
        gpu="NVIDIA H200",
        sm=gpu,
        comparisons=(ComparedResult(name="sum", error=0, tolerance=1),),
        negative_control="a wrong sum is refused",
        finished=now(),
    )
    signed = certificates.accept(given, {WHEEL.sha256: digests}, key, settings)
    assert {certificate.sm: certificate.other_sm for certificate in signed} == others

    wheel = BuiltFile(filename=WHEEL.filename, sha256=WHEEL.sha256, size=1)
    facts: dict[str, Any] = {
        "recipe": "thing",
        "name": "thing",
        "version": "1.0",
        "stack": "bare",
        "outcome": "built",
        "finished": now(),
    }
    build = Record(build_id="1", inputs={}, wheel=wheel, device_digests=digests, **facts)
    kept = {certificate.sm: certificate for certificate in certificates.of_record(build, settings)}
    assert list(kept.values()) == signed
    for sm, names in others.items():
        sentence = certificates.sentence(kept[sm], build)
        doubt = f"so it is not known whether the comparisons ran code for sm_{sm}"
        assert (f"can also run the code for sm_{''.join(names)} in the tested wheel, {doubt}" in sentence) == bool(names)
