"""Gate `cubins`: the device code is for exactly the architectures that stack and recipe ask for, and so is the PTX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from builder.audit import cuobjdump
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused

GATE = "cubins"


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Every object with a fatbin section, through NVIDIA's cuobjdump."""
    objects = coded(contents, policy)
    if not objects:
        if policy.needs_cubins:
            return refused(GATE, ["the recipe compiles CUDA code and the wheel holds none"])
        return not_applicable(GATE, "the wheel holds no CUDA device code")
    if policy.sm is None:
        return refused(GATE, [f"{name} holds CUDA device code, and the recipe says that there is none" for name in objects])
    if policy.cuobjdump is None:
        return refused(GATE, ["there is CUDA device code and no cuobjdump to read it with"])
    try:
        cubins = {name: cuobjdump.architectures(policy.cuobjdump, name, path) for name, path in objects.items()}
    except cuobjdump.UnreadableError as error:
        return refused(GATE, [str(error)])
    return compare(cubins, policy)


def coded(contents: Contents, policy: Policy) -> dict[str, Path]:
    """The objects that have device code."""
    return {name: binary.path for name, binary in contents.loadable(policy.target).items() if binary.fatbin}


def compare(found: dict[str, tuple[list[str], list[str]]], policy: Policy) -> Verdict:
    wanted = set(policy.sm or ())
    extra = {sm for values in policy.sm_extra.values() for sm in values} - wanted
    complaints: list[str] = []
    for name, (cubins, ptx) in found.items():
        counts = Counter(cubins)
        complaints += _ptx_complaints(name, counts, Counter(ptx), policy)
        complaints += [f"{name} has cubins for sm_{sm}, which nobody asked for" for sm in sorted(set(counts) - wanted - extra)]
        # An object made of sources with values of their own (sm_extra) alone may lack the stack's.
        if not set(counts) & extra:
            complaints += [f"{name} has no cubin for sm_{sm}" for sm in sorted(wanted - set(counts))]
        if not extra and len({counts[sm] for sm in wanted & set(counts)}) > 1:
            shown = ", ".join(f"{counts[sm]} for sm_{sm}" for sm in sorted(wanted))
            complaints.append(f"{name} has {shown}: some source was not compiled for all of them")
    everywhere = {sm for cubins, _ptx in found.values() for sm in cubins}
    complaints += [f"the recipe declares sm_{sm} (sm_extra) and no object has it" for sm in sorted(extra - everywhere)]
    if len(found) > 1 or extra:
        complaints += [f"no object has a cubin for sm_{sm}" for sm in sorted(wanted - everywhere)]
    details = [f"{name}: {_listed(cubins)}" for name, (cubins, _ptx) in found.items()]
    if complaints:
        return refused(GATE, list(dict.fromkeys(complaints)), details)
    names = ", ".join(f"sm_{sm}" for sm in sorted(everywhere))
    title = "no PTX" if policy.ptx is None else f"PTX for sm_{policy.ptx} in each object"
    return passed(GATE, f"cubins for exactly {names}, and {title}", details)


def _ptx_complaints(name: str, cubins: Counter[str], ptx: Counter[str], policy: Policy) -> Iterator[str]:
    """What is wrong with an object's PTX: units of each architecture, cubins and PTX, are counted."""
    yield from (f"{name} has PTX for sm_{sm}, which the cell does not ask for" for sm in sorted(set(ptx) - {policy.ptx}))
    if policy.ptx is None or not cubins:
        return
    if policy.ptx not in ptx:
        yield f"{name} has no PTX for sm_{policy.ptx}"
    elif ptx[policy.ptx] != max(cubins.values()):
        yield (
            f"{name} has PTX for sm_{policy.ptx} of {ptx[policy.ptx]} units and cubins of {max(cubins.values())}: "
            "some source was not compiled for both"
        )


def _listed(cubins: list[str]) -> str:
    return ", ".join(f"{count} for sm_{sm}" for sm, count in sorted(Counter(cubins).items())) or "no cubin"
