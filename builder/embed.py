"""The deterministic part of the record, inside the wheel."""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime
from pathlib import Path

from auditwheel.tools import dir2zip, zip2dir
from auditwheel.wheeltools import rewrite_record

from builder.plan import Plan
from gracefarm.files import remove_tree

EARLIEST = 315532800
"1980-01-01, the earliest time of a zip archive."


def embed(wheel: Path, plan: Plan, epoch: int, into: Path) -> Path:
    """The wheel with the deterministic part of the record as .dist-info/gracefarm.json; RECORD renewed, times are `epoch`."""
    text = json.dumps({"build_id": plan.build_id, "inputs": plan.inputs}, indent=2, sort_keys=True) + "\n"
    remove_tree(into)
    tree = into / "tree"
    tree.mkdir(parents=True)
    zip2dir(wheel, tree)
    (next(tree.glob("*.dist-info")) / "gracefarm.json").write_text(text)
    rewrite_record(tree)
    final = into / wheel.name
    dir2zip(tree, final, zlib.Z_DEFAULT_COMPRESSION, datetime.fromtimestamp(max(epoch, EARLIEST), tz=UTC))
    remove_tree(tree)
    return final
