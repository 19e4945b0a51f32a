"""Gate `symbols`: every undefined symbol is defined, with its version, by a library that is loaded with it.

This simulates glibc's loader on ELF tables. Nothing is executed, so it works for every target on every host.

- The roots are the objects of a wheel that no other object in it needs: extension modules, plugins, executables.
- The scope of a root is its DT_NEEDED closure, breadth first. For objects that Python loads, the interpreter and its
  closure are also visible, since they are global; other extension modules are not, since Python uses RTLD_LOCAL.
- A library must define each version that is required of it (.gnu.version_r): the loader checks this before it binds
  symbols (_dl_check_map_versions). A versioned reference must have a definition with that version in the scope.
- With a statically linked C++ runtime (-static-libstdc++) next to torch's shared one, all symbols resolve, but the first
  exception that crosses between them ends the process. This was a segmentation fault in a test on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.providers import Library, Providers
from builder.audit.verdict import Verdict, not_applicable, passed, refused
from builder.planning import driver

GATE = "symbols"

_CXX_RUNTIME, _CXX_THROW = "libstdc++.so.6", "__cxa_throw"


@dataclass(kw_only=True)
class _Findings:
    """The findings for all objects; each sentence occurs once, even if an object is in several scopes."""

    complaints: dict[str, None] = field(default_factory=dict)
    weak: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    resolved: dict[str, Counter[str]] = field(default_factory=dict)


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Resolve symbols in the wheel, the stack's environment and root, the interpreter and the driver's functions."""
    if not contents.loadable(policy.target):
        return not_applicable(GATE, f"the wheel has no ELF object for {policy.target}")
    if policy.root is None:
        return not_applicable(GATE, "the stack's root is not available")
    providers = Providers(contents, policy, policy.root)
    findings = _Findings()
    python = _python_scope(providers, policy, findings)
    for root in _roots(providers):
        scope = _closure(root, providers, findings)
        seen = scope if root.binary.interpreter else [*python, *scope]
        for library in scope:
            if library.place == "wheel":
                _check(library, seen, findings)
    return _verdict(findings)


def _verdict(findings: _Findings) -> Verdict:
    total = sum(sum(counts.values()) for counts in findings.resolved.values())
    details = [
        f"{name}: {', '.join(f'{count} in {label}' for label, count in counts.most_common())}"
        for name, counts in sorted(findings.resolved.items())
        if counts
    ]
    details += [*findings.notes, *findings.weak]
    if findings.complaints:
        return refused(GATE, list(findings.complaints), details)
    weak = f"; {len(findings.weak)} weak symbols are undefined" if findings.weak else ""
    objects = f"{len(findings.resolved)} object{'' if len(findings.resolved) == 1 else 's'}"
    return passed(GATE, f"{total} undefined symbols of {objects} are defined in the stack{weak}", details)


def _python_scope(providers: Providers, policy: Policy, findings: _Findings) -> list[Library]:
    interpreter = providers.interpreter()
    if interpreter is None:
        findings.notes[f"the root has no python{policy.python} for {policy.target}; symbols of Python count as undefined"] = (
            None
        )
        return []
    return _closure(interpreter, providers, findings)


def _roots(providers: Providers) -> list[Library]:
    """Objects that no other object of the wheel needs."""
    own = providers.own()
    needed = {
        provider.name
        for library in own
        for soname in library.binary.needed
        if (provider := providers.find(soname, library)) is not None
        and provider.place == "wheel"
        and provider.name != library.name
    }
    # A cycle of objects has no root: each of its objects then counts as a root.
    roots = [library for library in own if library.name not in needed]
    reached = {library.name for root in roots for library in _closure(root, providers, _Findings())}
    return roots + [library for library in own if library.name not in reached]


def _closure(root: Library, providers: Providers, findings: _Findings) -> list[Library]:
    """The root and all libraries that it needs, in the loader's order."""
    scope, known = [root], {_identity(root)}
    for library in scope:
        for soname in library.binary.needed:
            provider = providers.find(soname, library)
            if provider is None:
                _report_absent(soname, library, findings)
                continue
            if provider.place == "wheel" and providers.led_to(soname, library) is None:
                note = f"{library.name} has no RPATH to {soname}: the wheel must load its copy of {soname} first"
                findings.notes[note] = None
            if (identity := _identity(provider)) not in known:
                known.add(identity)
                scope.append(provider)
    return scope


def _identity(library: Library) -> tuple[str, str]:
    return library.place, library.name


def _report_absent(soname: str, library: Library, findings: _Findings) -> None:
    if library.place != "wheel":
        findings.notes[f"{library.label} needs {soname}, which is not in the stack"] = None
    elif soname == driver.SONAME:
        findings.complaints[f"{library.name} needs {soname}, but the stack has no cuda.h that declares its functions"] = None
    else:
        findings.complaints[f"{library.name} needs {soname}, which is neither in the wheel nor in the stack"] = None


def _check(library: Library, scope: list[Library], findings: _Findings) -> None:
    """Check one object of the wheel in one scope."""
    for complaint in (*_unmet_versions(library, scope), *_second_runtime(library, scope)):
        findings.complaints[complaint] = None
    counts = findings.resolved.setdefault(library.name, Counter())
    counts.clear()
    for reference in library.binary.references:
        provider = next((other for other in scope if other.binary.exports.meet(reference.name, reference.version)), None)
        if provider is not None:
            counts[provider.label] += 1
        elif reference.weak:
            findings.weak[f"{library.name}: weak {reference} is undefined"] = None
        else:
            findings.complaints[f"{library.name}: undefined symbol {reference}"] = None


def _unmet_versions(library: Library, scope: list[Library]) -> Iterator[str]:
    for need in library.binary.needs:
        provider = next(
            (other for other in scope if need.file in (other.binary.soname, other.name.rsplit("/", 1)[-1])),
            None,
        )
        if provider is None or need.weak or not provider.binary.exports.versions:
            continue
        defined = provider.binary.exports.versions.values()
        if need.version not in defined:
            newest = _newest(need.version, list(defined)) or "no such version"
            yield f"{library.name} needs version {need.version} of {need.file}; the stack has {newest}"


def _second_runtime(library: Library, scope: list[Library]) -> Iterator[str]:
    if _CXX_THROW in library.binary.exports.symbols and any(other.binary.soname == _CXX_RUNTIME for other in scope):
        yield (
            f"{library.name} has its own C++ runtime and is loaded with {_CXX_RUNTIME}: an exception that "
            "passes from one runtime to the other ends the process; link with the shared runtime, without -static-libstdc++"
        )


def _newest(version: str, defined: list[str]) -> str | None:
    """The newest version of the same family (GLIBC_2.36 for GLIBC_2.99), for the message."""
    family = version.rpartition("_")[0]
    same = [name for name in defined if name.rpartition("_")[0] == family]

    def numbers(name: str) -> list[int]:
        return [int(part) for part in name.rpartition("_")[2].split(".") if part.isdigit()]

    return f"only versions up to {max(same, key=numbers)}" if same else None
