"""The wheels that the Python index lists for a project: for free-threaded Pythons, whose wheels uv omits."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from builder.fetch.urls import split_credentials
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack


def by_version(name: str, stack: LoadedStack, settings: Settings) -> dict[str, dict[str, str]]:
    """The sha256 of each wheel by file name, for each version that the index lists. Wheels without a sha256 are omitted, and
    wheels that were uploaded after the stack's `resolved_before`.

    Raises:
        FetchError: the index cannot be reached.
    """
    from builder.fetch import simple  # imports requests

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    end = _end(stack.data.environment.resolved_before)
    versions: dict[str, dict[str, str]] = {}
    for file in simple.project_page(name, index, credentials).packages:
        try:
            version = str(parse_wheel_filename(file.filename)[1])
        except InvalidWheelFilename:
            continue
        in_time = end is None or (file.upload_time is not None and file.upload_time < end)
        if in_time and "sha256" in file.digests:
            versions.setdefault(version, {})[file.filename] = file.digests["sha256"]
    return versions


def _end(resolved_before: str | None) -> datetime | None:
    """The first moment whose uploads are ignored. As in uv, a date includes its whole day."""
    if not resolved_before:
        return None
    if len(resolved_before) == len("2026-01-31"):
        return datetime.combine(date.fromisoformat(resolved_before) + timedelta(days=1), time(), UTC)
    return datetime.fromisoformat(resolved_before)
