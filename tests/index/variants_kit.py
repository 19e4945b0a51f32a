"""Variant wheels, and an index that accepts them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from index_kit import Server, serving, wheel

from gracefarm import variants

TAGS = "py3-none-any"
NVIDIA = {
    "plugin-api": "nvidia_variant_provider.plugin:NvidiaVariantPlugin",
    "requires": ["nvidia-variant-provider"],
}
VARIANTS: dict[str, dict[str, dict[str, list[str]]]] = {
    "cu130_sm90": {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": ["90_real"]}},
    "cu130_sm100": {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": ["100_real"]}},
    "cu124_sm90": {"nvidia": {"cuda_version_lower_bound": ["12.4"], "sm_arch": ["90_real"]}},
    "null": {},
}


def metadata(label: str, **more: object) -> bytes:
    document = {
        "$schema": variants.SCHEMA,
        "default-priorities": {"namespace": ["nvidia"]},
        "providers": {"nvidia": NVIDIA},
        "variants": {label: VARIANTS.get(label, VARIANTS["cu130_sm90"])},
        **more,
    }
    return json.dumps(document).encode()


def variant_wheel(
    name: str, label: str, version: str = "1.0", *, inside: bytes | None = None, tags: str = TAGS
) -> tuple[str, bytes]:
    """A wheel of this variant; `inside` is its variant.json."""
    files = {
        f"{name}/__init__.py": f"VARIANT = {label!r}\n".encode(),
        f"{name}-{version}.dist-info/{variants.MEMBER}": metadata(label) if inside is None else inside,
    }
    filename, content = wheel(name, version, tags, files=files)
    return filename.replace(".whl", f"-{label}.whl"), content


def plain_wheel(name: str, version: str = "1.0") -> tuple[str, bytes]:
    return wheel(name, version, files={f"{name}/__init__.py": b"VARIANT = 'plain'\n"})


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("variants") / "root", "--allow-new", "--variants") as running:
        yield running


@pytest.fixture(scope="module")
def filled(farm: Server) -> Server:
    """A release with four variants and a plain wheel."""
    for item in (plain_wheel("choice_pkg"), *(variant_wheel("choice_pkg", label) for label in VARIANTS)):
        assert farm.upload(*item).status_code == 200
    return farm


def link(server: Server, project: str, prefix: str = "", version: str = "1.0") -> dict[str, object] | None:
    """The entry of a release's variants.json on the page of the project."""
    name = variants.index_filename(f"{project.replace('-', '_')}-{version}")
    files = server.page(project, prefix=prefix).json()["files"]
    return next((item for item in files if item["filename"] == name), None)


def labels(server: Server, project: str, prefix: str = "", version: str = "1.0") -> list[str]:
    """The labels of the variants in the variants.json to which the page links."""
    item = link(server, project, prefix, version)
    assert item is not None
    answer = server.client.get(f"{prefix}/simple/{project}/{item['url']}")
    assert answer.status_code == 200, answer.text
    assert len(answer.content) == item["size"]
    return list(answer.json()["variants"])
