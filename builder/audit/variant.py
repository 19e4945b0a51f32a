"""The variant that a wheel is (PEP 825, a draft), as it is measured: CUDA's release and the architectures of its device code.

NVIDIA's provider, which uv has built in, knows `cuda_version_lower_bound` (the driver's) and `sm_arch`: 90_real runs on 9.0
and later 9.x, 90_virtual (PTX) on 9.0 and all later ones. glibc is no property: the platform tag says it.
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
"What the variant.json of every wheel says alike."


class UnlabelledError(ValueError):
    """What is measured cannot be said as a variant; a phrase."""


def measure(contents: Contents, policy: Policy) -> Variant:
    """The variant that a wheel is, as its objects say; `null` where they depend on no CUDA.

    Raises:
        UnlabelledError: its device code cannot be read, or is for a device that no property names.
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
    """Of the cubins and of the PTX that every object with device code has: a device needs all of them."""
    objects = cubins.coded(contents, policy)
    if not objects:
        return [], []
    if policy.cuobjdump is None:
        raise UnlabelledError("there is device code and no cuobjdump to read it with")
    try:
        read = [cuobjdump.architectures(policy.cuobjdump, name, path) for name, path in objects.items()]
    except cuobjdump.UnreadableError as error:
        raise UnlabelledError(str(error)) from error
    everywhere = [{_device(sm) for sm in real} for real, _ in read]
    shared = set.intersection(*everywhere)
    real = {sm for codes, _ in read for sm in codes if _device(sm) in shared}
    virtual = set.intersection(*({*codes} for _, codes in read))
    if not real and not virtual:
        raise UnlabelledError("no architecture is in all of its objects")
    return sorted(real, key=_order), sorted(virtual, key=_order)


def _device(sm: str) -> str:
    return sm.rstrip("af")


def _order(sm: str) -> tuple[int, str]:
    return int(_device(sm)), sm


def _real(sm: str) -> str:
    """The property of a cubin.

    Raises:
        UnlabelledError: it is for one device alone, and the property would name later ones too.
    """
    if sm.endswith("a") and sm != "90a":  # there is no other 9.x
        raise UnlabelledError(
            f"device code for sm_{sm} runs on that device alone, and no property of NVIDIA's provider says so"
        )
    return f"{_device(sm)}_real"
