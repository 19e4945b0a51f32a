"""The simple API as bytes: JSON (PEP 691, 700, 714, 740, 792) first, HTML (PEP 503, 592, 629, 658) frozen at 1.4 (PEP 833)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from packaging.version import Version

from index.simple_api.views import Listed, ProjectStatus, View
from index.store.provenance import SUFFIX
from index.trust.publishers import is_safe_url

API_VERSION = "1.4"

_HEAD = '<!DOCTYPE html>\n<html>\n  <head>\n    <meta name="pypi:repository-version" content="1.4">\n'


def root_json(names: Sequence[str]) -> bytes:
    """The list of projects."""
    return _dump({"meta": {"api-version": API_VERSION}, "projects": [{"name": name} for name in names]})


def root_html(names: Sequence[str]) -> bytes:
    """The list of projects."""
    links = "".join(f'    <a href="{name}/">{name}</a><br>\n' for name in names)
    return f"{_HEAD}    <title>Simple index</title>\n  </head>\n  <body>\n{links}  </body>\n</html>\n".encode()


def project_json(
    view: View, project: str, files: Sequence[Listed], status: ProjectStatus, base_url: str | None = None
) -> bytes:
    """One project's files; `base_url` is the address of the index, if it is known."""
    shown = _shown(files, status)
    state: dict[str, object] = {"status": status.status}
    if status.reason:
        state["reason"] = status.reason
    return _dump(
        {
            "meta": {"api-version": API_VERSION},
            "name": project,
            "project-status": state,
            "versions": sorted({item.version for item in shown}, key=Version),
            "files": [_file(view, item, base_url) for item in shown],
        }
    )


def project_html(
    view: View, project: str, files: Sequence[Listed], status: ProjectStatus, base_url: str | None = None
) -> bytes:
    """The same for installers that read only HTML; sizes, times and versions exist only in JSON."""
    head = _HEAD + f'    <meta name="pypi:project-status" content="{escape(status.status)}">\n'
    if status.reason:
        head += f'    <meta name="pypi:project-status-reason" content="{escape(status.reason)}">\n'
    links = "".join(_link(view, item, base_url) for item in _shown(files, status))
    title = f"Links for {project}"
    return f"{head}    <title>{title}</title>\n  </head>\n  <body>\n    <h1>{title}</h1>\n{links}  </body>\n</html>\n".encode()


def file_path(item: Listed) -> str:
    """Address of our copy from the root. `+` is written as %2B, because object stores decode a bare plus as a space."""
    return f"files/{item.sha256}/{quote(item.filename, safe='')}"


def file_url(view: View, item: Listed) -> str:
    """Address of the file in a project's page: relative for our copies, so that any mount point works."""
    return item.url or "../" * (len(view.prefix) + 2) + file_path(item)


def _shown(files: Sequence[Listed], status: ProjectStatus) -> Sequence[Listed]:
    """The files to show; a quarantined project offers none (PEP 792)."""
    return () if status.status == "quarantined" else files


def _provenance_url(item: Listed, base_url: str | None) -> str | None:
    """Address of the file's attestations. PEP 740 requires an absolute address, which only an index with `--url` knows."""
    if item.provenance_sha256 is None or not base_url or not is_safe_url(base_url):
        return None
    return f"{base_url.rstrip('/')}/{file_path(item)}{SUFFIX}"


def _file(view: View, item: Listed, base_url: str | None) -> dict[str, object]:
    entry: dict[str, object] = {
        "filename": item.filename,
        "url": file_url(view, item),
        "hashes": {
            "sha256": item.sha256
        },  # only one hash: with several, uv locks the longest and then does not find it (uv#17143)
        "size": item.size,
        "upload-time": item.uploaded,
        "yanked": False if item.yanked is None else item.yanked or True,
        "core-metadata": {"sha256": item.metadata_sha256} if item.metadata_sha256 else False,
    }
    if item.requires_python:
        entry["requires-python"] = item.requires_python
    if provenance := _provenance_url(item, base_url):
        entry["provenance"] = provenance
    entry.update(item.facts.keys())
    if item.defects:
        entry["_defects"] = list(item.defects)
    if item.build:
        # The record of a staged build exists only below the preview's address.
        up = 2 if view.prefix[:1] == ("preview",) else len(view.prefix) + 2
        entry["_record"] = "../" * up + f"records/{quote(item.build, safe='')}"
    return entry


def _link(view: View, item: Listed, base_url: str | None) -> str:
    attributes = ""
    if item.requires_python:
        attributes += f' data-requires-python="{escape(item.requires_python)}"'
    if item.metadata_sha256:
        attributes += f' data-core-metadata="sha256={item.metadata_sha256}"'
    if provenance := _provenance_url(item, base_url):
        attributes += f' data-provenance="{escape(provenance)}"'
    if item.yanked is not None:
        attributes += f' data-yanked="{escape(item.yanked)}"'
    return f'    <a href="{escape(file_url(view, item))}#sha256={item.sha256}"{attributes}>{escape(item.filename)}</a><br>\n'


def _dump(page: dict[str, object]) -> bytes:
    return json.dumps(page, separators=(",", ":"), ensure_ascii=False).encode()
