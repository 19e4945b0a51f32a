"""The lock of a set, generated from its files: every project in its version, each file by sha256, without a URL.

pip and uv can read it from the index: `pip install --require-hashes --no-deps -r http://…/NAME/requirements.lock`.
"""

from __future__ import annotations

from gracefarm import pins
from index.errors import NotFoundError
from index.simple_api import views
from index.simple_api.views import View
from index.store.catalogue import Catalogue

FILENAME = "requirements.lock"

_EVER = """
SELECT project FROM file JOIN member ON file_id = id JOIN release_set ON name = set_name
    WHERE name = :name AND (deleted IS NULL OR deleted > published)
UNION SELECT project FROM mirrored JOIN release_set ON name = set_name
    WHERE name = :name AND (withdrawn IS NULL OR withdrawn > published)
"""
"Projects that the set has, or had when it was published."


def render(catalogue: Catalogue, view: View) -> str:
    """The lock's text.

    Call it within one moment of the catalogue.

    Raises:
        NotFoundError: the set has several versions of a project (for example one per architecture), which one lock cannot
            express; or every file of a project was lost, withdrawn or deleted, so a lock would silently lack the project.
    """
    names = views.projects(catalogue, view)
    gone = {row["project"] for row in catalogue.rows(_EVER, {"name": view.argument})}.difference(names)
    if gone:
        raise NotFoundError(
            f"the set {view.argument} no longer has files of {', '.join(sorted(gone))}, so its lock would be incomplete",
            remedy="ask the operator of this index; `index log` and `index fsck` show the reason",
        )
    lines = [f"# The set {view.argument} of this index.\n"]
    for project in names:
        files = views.files(catalogue, view, project)
        versions = sorted({item.version for item in files})
        if len(versions) > 1:
            raise NotFoundError(
                f"the set {view.argument} has several versions of {project} ({', '.join(versions)}), so it has no lock",
                remedy=f"install from /{view.argument}/simple/, and pin the version of {project}",
            )
        lines.append(pins.render(project, versions[0], {item.sha256 for item in files}))
    return "".join(lines)
