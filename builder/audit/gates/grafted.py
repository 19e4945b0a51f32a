"""Gate `grafted`: the only third-party files are those that the recipe declares with path, digest and licence."""

from __future__ import annotations

import hashlib
import re
import zipfile
from fnmatch import fnmatch
from pathlib import PurePosixPath

from builder.audit import dependence
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.providers import environment_sonames
from builder.audit.verdict import Verdict, passed, refused

GATE = "grafted"

LIBRARIES = (*dependence.TORCH, *dependence.CUDA, "libnvidia*")
"Names of torch's and NVIDIA's libraries."

TOOLS = ("ptxas", "cuobjdump", "nvdisasm", "nvlink", "nvcc", "cicc", "cudafe++", "fatbinary", "bin2c", "libdevice.*.bc")
"Parts of NVIDIA's toolkit that packages copy into their wheels (triton does)."

_HASHED = re.compile(r"-[0-9a-f]{8}(?=\.so)")


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Find third-party files without a declaration, and declarations without a file."""
    declared = {entry.path: entry for entry in policy.bundled if entry.sha256}
    from_sources = [entry for entry in policy.bundled if not entry.sha256]
    sonames = environment_sonames(policy.site_packages)
    complaints = [
        f"{name} is third-party ({why}), but the recipe does not declare it"
        for name in contents.names
        if name not in declared
        and not any(fnmatch(name, entry.path) for entry in from_sources)
        and (why := _third_party(name, contents, sonames))
    ]
    details = []
    for path, entry in declared.items():
        if path not in contents.names:
            complaints.append(f"{path} is declared, but not in the wheel")
        elif (digest := _sha256(contents, path)) != entry.sha256:
            complaints.append(f"{path} has sha256 {digest}, but the recipe declares {entry.sha256}")
        else:
            details.append(f"{path} ({entry.license})")
    for entry in from_sources:
        # Its bytes come from a download that the recipe pins, or from the source.
        found_names = [name for name in contents.names if fnmatch(name, entry.path)]
        complaints += [] if found_names else [f"{entry.path} is declared, but not in the wheel"]
        details += [f"{name} ({entry.license}, from {entry.origin})" for name in found_names]
    if complaints:
        return refused(GATE, complaints, details)
    summary = f"the recipe declares all third-party files ({len(details)})" if details else "no third-party files"
    return passed(GATE, summary, details)


def _third_party(name: str, contents: Contents, sonames: frozenset[str]) -> str | None:
    """Why a file counts as third-party, or None."""
    path = PurePosixPath(name)
    if any(part.endswith(".libs") for part in path.parts[:-1]):
        return "in a .libs folder, where auditwheel puts libraries"
    if any(fnmatch(path.name, pattern) for pattern in TOOLS):
        return "part of the CUDA toolkit"
    binary = contents.objects.get(name)
    names = {path.name} if ".so" in path.name else set()
    names |= {binary.soname} if binary is not None and binary.soname else set()
    for own in sorted(names):
        plain = _HASHED.sub("", own)
        if any(fnmatch(plain, f"{pattern}.so*") for pattern in LIBRARIES):
            return f"{own} is a library of torch or CUDA"
        if plain in sonames:
            return f"the stack's environment has {plain}"
    return None


def _sha256(contents: Contents, name: str) -> str:
    with zipfile.ZipFile(contents.wheel) as archive, archive.open(name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type] # a ZipExtFile has readinto
