"""pyproject.toml has everything but this: a wheel carries recipes, stacks, interpreters and sets as builder/project."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT = ("recipes", "stacks", "interpreters", "sets")


class BuildWithProject(build_py):
    """An editable install has no copy of them: the folders of the checkout are its project."""

    def run(self) -> None:
        """Copy them into the tree that becomes the wheel."""
        super().run()
        if not self.editable_mode:
            for name in PROJECT:
                into = Path(self.build_lib, "builder", "project", name)
                shutil.rmtree(into, ignore_errors=True)
                shutil.copytree(name, into, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy("matrix.toml", Path(self.build_lib, "builder", "project"))


setup(cmdclass={"build_py": BuildWithProject})
