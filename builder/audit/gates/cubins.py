"""Gate `cubins`: cubins and PTX are for exactly the architectures of stack and recipe."""

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
    """Check every object with a fatbin section, with NVIDIA's cuobjdump."""
    objects = coded(contents, policy)
    if not objects:
        if policy.needs_cubins:
            return refused(GATE, ["the recipe compiles CUDA code, but the wheel has no device code"])
        return not_applicable(GATE, "the wheel has no CUDA device code")
    if policy.sm is None:
        return refused(GATE, [f"{name} has CUDA device code, but the recipe has cuda = false" for name in objects])
    if policy.cuobjdump is None:
        return refused(GATE, ["the wheel has CUDA device code, but there is no cuobjdump to read it"])
    try:
        cubins = {name: cuobjdump.architectures(policy.cuobjdump, name, path) for name, path in objects.items()}
    except cuobjdump.UnreadableError as error:
        return refused(GATE, [str(error)])
    return compare(cubins, policy)


def coded(contents: Contents, policy: Policy) -> dict[str, Path]:
    """The objects that have device code."""
    return {name: binary.path for name, binary in contents.loadable(policy.target).items() if binary.fatbin}


def compare(architectures: dict[str, tuple[list[str], list[str]]], policy: Policy) -> Verdict:
    wanted = set(policy.sm or ())
    extra = {sm for values in policy.sm_extra.values() for sm in values} - wanted
    complaints: list[str] = []
    for name, (cubins, ptx) in architectures.items():
        counts = Counter(cubins)
        complaints += _ptx_complaints(name, counts, Counter(ptx), policy)
        complaints += [
            f"{name} has cubins for sm_{sm}, which was not requested" for sm in sorted(set(counts) - wanted - extra)
        ]
        # An object may have no cubins for the stack's values if all of its sources are listed in sm_extra.
        if not set(counts) & extra:
            complaints += [f"{name} has no cubin for sm_{sm}" for sm in sorted(wanted - set(counts))]
        if not extra and len({counts[sm] for sm in wanted & set(counts)}) > 1:
            shown = ", ".join(f"{counts[sm]} for sm_{sm}" for sm in sorted(wanted))
            complaints.append(f"{name} has different numbers of cubins ({shown}): a source was not compiled for all of them")
    everywhere = {sm for cubins, _ptx in architectures.values() for sm in cubins}
    complaints += [
        f"the recipe declares sm_{sm} (sm_extra), but no object has a cubin for it" for sm in sorted(extra - everywhere)
    ]
    if len(architectures) > 1 or extra:
        complaints += [f"no object has a cubin for sm_{sm}" for sm in sorted(wanted - everywhere)]
    details = [f"{name}: {_listed(cubins)}" for name, (cubins, _ptx) in architectures.items()]
    if complaints:
        return refused(GATE, list(dict.fromkeys(complaints)), details)
    names = ", ".join(f"sm_{sm}" for sm in sorted(everywhere))
    title = "no PTX" if policy.ptx is None else f"PTX for sm_{policy.ptx} in each object"
    return passed(GATE, f"cubins for exactly {names}, and {title}", details)


def _ptx_complaints(name: str, cubins: Counter[str], ptx: Counter[str], policy: Policy) -> Iterator[str]:
    """Complaints about an object's PTX, from the number of cubins and PTX for each architecture."""
    yield from (f"{name} has PTX for sm_{sm}, which was not requested" for sm in sorted(set(ptx) - {policy.ptx}))
    if policy.ptx is None or not cubins:
        return
    if policy.ptx not in ptx:
        yield f"{name} has no PTX for sm_{policy.ptx}"
    elif ptx[policy.ptx] != max(cubins.values()):
        yield (
            f"{name} has PTX for sm_{policy.ptx} from {ptx[policy.ptx]} translation units, but cubins from "
            f"{max(cubins.values())}: a source was not compiled to both PTX and cubins"
        )


def _listed(cubins: list[str]) -> str:
    return ", ".join(f"{count} for sm_{sm}" for sm, count in sorted(Counter(cubins).items())) or "no cubin"
