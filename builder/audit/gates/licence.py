"""Gate `licence`: everything that a recipe fetches has a declared licence, and the wheel contains the declared texts.

https://peps.python.org/pep-0639/
"""

from __future__ import annotations

from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused

GATE = "licence"


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Find submodules, repositories and downloads without a licence, and texts that are missing in .dist-info/licenses."""
    if not policy.parts and not policy.licenses:
        return not_applicable(GATE, "the recipe fetches no code besides the package's source")
    complaints = [
        f"{part} has no declared licence: add `license` to its table in the recipe"
        for part, license_id in policy.parts.items()
        if license_id is None
    ]
    present = {name.partition(".dist-info/licenses/")[2] for name in contents.names if ".dist-info/licenses/" in name}
    complaints += [f"the text {text} is not in .dist-info/licenses" for text in policy.licenses if text not in present]
    details = [f"{part}: {license_id}" for part, license_id in policy.parts.items() if license_id is not None]
    if complaints:
        return refused(GATE, complaints, details)
    texts = "1 text" if len(policy.licenses) == 1 else f"{len(policy.licenses)} texts"
    return passed(
        GATE, f"the recipe declares a licence for all other code ({len(details)}); {texts} in .dist-info/licenses", details
    )
