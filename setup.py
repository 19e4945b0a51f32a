"""Copies recipes, stacks, interpreters and sets into the wheel, as builder/project. The rest is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT = ("recipes", "stacks", "interpreters", "sets")


class BuildWithProject(build_py):
    """Builds the wheel with a copy of the project's folders. An editable install uses the folders of the checkout."""

    def run(self) -> None:
        """Copy the folders into the tree that becomes the wheel."""
        super().run()
        if not self.editable_mode:
            for name in PROJECT:
                into = Path(self.build_lib, "builder", "project", name)
                shutil.rmtree(into, ignore_errors=True)
                shutil.copytree(name, into, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy("matrix.toml", Path(self.build_lib, "builder", "project"))


setup(cmdclass={"build_py": BuildWithProject})
