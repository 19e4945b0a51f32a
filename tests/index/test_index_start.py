"""A server starts quickly: modules for rare requests are imported by the first such request."""

from __future__ import annotations

import subprocess
import sys

from index_kit import REPOSITORY

LATER = {
    *("pydantic", "rich.progress", "jinja2", "prometheus_client", "packaging.pylock", "readme_renderer", "nh3"),
    *("jwt", "httpx", "cryptography", "sigstore", "pypi_attestations", "pypi_simple", "requests"),
}


def test_what_few_requests_need_is_not_imported_at_start() -> None:
    code = "import sys, index.cli, index.cli.serve, index.serving.server; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(process.stdout.split()) & LATER == set()
