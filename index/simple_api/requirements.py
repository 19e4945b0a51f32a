"""The lock of a set, from what the set shows: every project in its one version, each file by sha256, without a URL.

pip and uv read it from the index itself: `pip install --require-hashes --no-deps -r http://…/NAME/requirements.lock`.
"""

from __future__ import annotations

from gracefarm import pins
from index.errors import NotFoundError
from index.simple_api import listings
from index.simple_api.listings import View
from index.store.catalogue import Catalogue

FILENAME = "requirements.lock"

_EVER = """
SELECT project FROM file JOIN member ON file_id = id JOIN release_set ON name = set_name
    WHERE name = :name AND (deleted IS NULL OR deleted > published)
UNION SELECT project FROM mirrored JOIN release_set ON name = set_name
    WHERE name = :name AND (withdrawn IS NULL OR withdrawn > published)
"""
"What the set has, or had when it was published."


def render(catalogue: Catalogue, view: View) -> str:
    """The lock's text.

    Call it within one moment of the catalogue.

    Raises:
        NotFoundError: the set has a project in several versions, one for each architecture say, which no one lock can name;
            or every file of a project was lost, withdrawn or deleted: nothing is resolved, so nobody would miss it.
    """
    names = listings.projects(catalogue, view)
    gone = {row["project"] for row in catalogue.rows(_EVER, {"name": view.argument})}.difference(names)
    if gone:
        raise NotFoundError(
            f"the set {view.argument} no longer shows {', '.join(sorted(gone))}: its lock would leave that out in silence",
            remedy="whoever runs this index sees why: `index log`, `index fsck`",
        )
    lines = [f"# The set {view.argument}, as this index shows it.\n"]
    for project in names:
        files = listings.files(catalogue, view, project)
        versions = sorted({item.version for item in files})
        if len(versions) > 1:
            raise NotFoundError(
                f"the set {view.argument} has {project} in several versions ({', '.join(versions)}): no one lock names them",
                remedy="install from the lock that was made with the set",
            )
        lines.append(pins.render(project, versions[0], {item.sha256 for item in files}))
    return "".join(lines)
