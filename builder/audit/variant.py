"""Determine the variant of a wheel (PEP 825, a draft) from its content: CUDA's release, and architectures of its device code.

NVIDIA's provider, which is built into uv, has `cuda_version_lower_bound` (for the driver) and `sm_arch`: 90_real runs on 9.0
and later 9.x, 90_virtual (PTX) on 9.0 and all later ones. glibc is not a property, since the platform tag names it.
"""

from __future__ import annotations

import json

from builder.audit import cuobjdump, dependence
from builder.audit.contents import Contents
from builder.audit.gates import cubins
from builder.audit.policy import Policy
from gracefarm import variants
from gracefarm.variants import Properties, Variant

NAMESPACE = "nvidia"
SHARED = {
    "$schema": variants.SCHEMA,
    "default-priorities": {"namespace": [NAMESPACE]},
    "providers": {
        NAMESPACE: {
            "plugin-api": "nvidia_variant_provider.plugin:NvidiaVariantPlugin",
            "requires": ["nvidia-variant-provider"],
        }
    },
}
"The part of variant.json that is equal for all wheels."


class UnlabelledError(ValueError):
    """The measured properties of a wheel cannot be expressed as a variant. The message is the reason."""


def measure(contents: Contents, policy: Policy) -> Variant:
    """The variant of a wheel, measured at its objects; `null` if they do not depend on CUDA.

    Raises:
        UnlabelledError: its device code cannot be read, or is for a device that no property can name.
        HostError: cuobjdump does not run.
    """
    features: dict[str, list[str]] = {}
    parts = []
    if dependence.measure(contents, policy.target).cuda and policy.cuda is not None:
        features["cuda_version_lower_bound"] = [policy.cuda]
        parts.append(f"cu{policy.cuda.replace('.', '')}")
    real, virtual = _architectures(contents, policy)
    if real or virtual:
        features["sm_arch"] = list(dict.fromkeys([*map(_real, real), *(f"{sm}_virtual" for sm in virtual)]))
        parts += [*(f"sm{sm}" for sm in real), *(f"ptx{sm}" for sm in virtual)]
    properties: Properties = {NAMESPACE: features} if features else {}
    return Variant(label="_".join(parts) or variants.NULL, properties=properties, shared=json.dumps(SHARED, sort_keys=True))


def document(of: Variant) -> bytes:
    """Its variant.json."""
    content = {**json.loads(of.shared), "variants": {of.label: of.properties}}
    return json.dumps(content, indent=1).encode() + b"\n"


def _architectures(contents: Contents, policy: Policy) -> tuple[list[str], list[str]]:
    """Architectures of cubins and of PTX that all objects with device code have, since a device needs all objects."""
    objects = cubins.coded(contents, policy)
    if not objects:
        return [], []
    if policy.cuobjdump is None:
        raise UnlabelledError("the wheel has device code, but there is no cuobjdump to read it")
    try:
        read = [cuobjdump.architectures(policy.cuobjdump, name, path) for name, path in objects.items()]
    except cuobjdump.UnreadableError as error:
        raise UnlabelledError(str(error)) from error
    everywhere = [{_device(sm) for sm in real} for real, _ in read]
    shared = set.intersection(*everywhere)
    real = {sm for codes, _ in read for sm in codes if _device(sm) in shared}
    virtual = set.intersection(*({*codes} for _, codes in read))
    if not real and not virtual:
        raise UnlabelledError("no GPU architecture is in all objects with device code")
    return sorted(real, key=_order), sorted(virtual, key=_order)


def _device(sm: str) -> str:
    return sm.rstrip("af")


def _order(sm: str) -> tuple[int, str]:
    return int(_device(sm)), sm


def _real(sm: str) -> str:
    """The property of a cubin.

    Raises:
        UnlabelledError: it is for one device only, but the property would include later ones.
    """
    if sm.endswith("a") and sm != "90a":  # there is no other 9.x
        raise UnlabelledError(
            f"device code for sm_{sm} runs only on that device, which no property of NVIDIA's provider can express"
        )
    return f"{_device(sm)}_real"
