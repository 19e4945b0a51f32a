"""Gate `variant`: label and variant.json of a variant wheel match its measured properties (PEP 825, a draft)."""

from __future__ import annotations

import zipfile

from builder.audit import variant
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused
from gracefarm import variants
from gracefarm.console import counted

GATE = "variant"


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Compare the label with variant.json, and both with cubins, PTX and libraries."""
    members = [name for name in contents.names if name.endswith(f".dist-info/{variants.MEMBER}")]
    if not contents.label and not members:
        return not_applicable(GATE, "the wheel has no variant label")
    if not contents.label or len(members) != 1:
        label = f"the label {contents.label}" if contents.label else "no label"
        files = f"{counted(len(members), 'file')} named {variants.MEMBER}"
        return refused(GATE, [f"the file name has {label}, but .dist-info has {files}"])
    try:
        measured = variant.measure(contents, policy)
        with zipfile.ZipFile(contents.wheel) as archive:
            declared = variants.parse(archive.read(members[0]), contents.label)
    except ValueError as error:
        return refused(GATE, [str(error)])
    if declared.label != measured.label:
        return refused(GATE, [f"the label is {declared.label}, but {measured.label} was measured"])
    if declared != measured:
        return refused(
            GATE, [f"{variants.MEMBER} has {dict(declared.properties)}, but {dict(measured.properties)} was measured"]
        )
    return passed(GATE, f"{declared.label}, as measured")
