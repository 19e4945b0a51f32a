"""Write the JSON schemas, and the reference pages of the command lines and of the schemas: python -m tools.reference

tests/unit/test_reference.py compares the pages in docs/reference with the code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from builder.cli import upkeep
from deploy.cli import plan
from gracefarm.files import atomic_write
from index.cli import documents
from tools.schema_pages import NOTE, SchemaPage

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
PROGRAMS = ("builder", "index", "deploy")
WIDTH = 80

FILES = {
    "recipe": (
        "recipes/NAME/recipe.toml",
        "recipe.toml",
        "A recipe describes how one wheel is built. [Recipes](recipes.md) has an example and the steps for a new recipe.",
    ),
    "stack": (
        "stacks/NAME/stack.toml",
        "stack.toml",
        (
            "A stack pins Python, torch, CUDA and the compilers that wheels are built with. [Stacks](stacks.md) describes "
            "the locks."
        ),
    ),
    "interpreter": (
        "interpreters/NAME/interpreter.toml",
        "interpreter.toml",
        (
            "An interpreter is a Python for which wheels can be built. The option `--python NAME` of `builder build` selects "
            "it instead of the root's Python."
        ),
    ),
    "set": (
        "sets/NAME/set.toml",
        "set.toml",
        "A set is a list of wheels that are built, tested and published together. [Sets](sets.md) describes the steps.",
    ),
    "selectors": (
        "matrix.toml",
        "matrix.toml",
        (
            "A selector is a text that selects builds by recipe, stack, Python, target and sm values. The comments in "
            "matrix.toml describe its syntax."
        ),
    ),
}
"Schema to the heading of its section, the short name of the file, and the first sentences."

DEPLOY_FILE = {
    "deploy": (
        "deploy.toml",
        "deploy.toml",
        "The first table lists the top-level keys. Each heading below it names one TOML table.",
    ),
}

DOCUMENTS = {
    "record": (
        "record.json of a build",
        "record.json",
        (
            "`builder build` writes this record for every build, even if the build fails. Its path is "
            "`GRACEFARM_HOME/builds/BUILD_ID/record.json`."
        ),
    ),
    "set-record": (
        "set.json of a set",
        "set.json",
        "`builder set build` writes this record after the test of a set. Its path is `GRACEFARM_HOME/sets/SET_ID/set.json`.",
    ),
    "matrix": (
        "PUT /matrix/NAME",
        "PUT /matrix/NAME",
        (
            "A matrix lists *cells*. A cell is one wheel for one combination of recipe, stack, Python, target and sm values. "
            "`builder matrix --publish` uploads this document to the index, and `builder matrix --json` prints it. The page "
            "`/board/` of the index shows it as a table."
        ),
    ),
    "certificate": (
        "PUT /certificates/DIGEST",
        "PUT /certificates/DIGEST",
        (
            "A *certificate* states that the device code of a wheel computed correct results on a GPU. `builder certify "
            "--accept REPORT --publish URL` uploads this document to the index. [Certificates](../howto/gpu.md#certificates) "
            "describes the test."
        ),
    ),
    "deploy-plan": (
        "deploy plan --json",
        "deploy plan --json",
        (
            "`deploy plan --json` prints this document. [Nodes, and the plan](deploy.md) explains it. The *engine* is the "
            "program that runs the model: vLLM or Aphrodite. *Ray* is a program that connects nodes and starts processes "
            "on them. The *head* is the first node. The main process of the engine runs there. A *replica* is one copy of "
            "the model's layers. A *stage* is a group of GPUs that hold the same layers. *Offloaded* weights are weights "
            "in host memory (the memory of the CPU). The *KV cache* has the keys and values of all tokens of the running "
            "requests. A *stream* is a client that sends one request after the other."
        ),
    ),
}
"Schema to the heading of its section, the short name of the document, and the first sentences."

COLUMNS = """\
The column *value* gives the type of the value. The word `required` means that the key must be present. All other keys may be
absent. The value after the word `default` applies if the key is absent."""

FILES_INTRO = f"""\
This page lists every key of the TOML files of a project. A *project* is a folder with recipes, stacks, interpreters, sets
and the file matrix.toml. A checkout of gracefarm is a project, and `builder init DIR` creates another one.
[deploy.toml](deploy-toml.md) has a separate page. A key that is not listed is an error.

Each file has a section. The first table of a section lists the top-level keys of the file. Each further heading names one
TOML table, for example `[build]`. A name in double brackets, such as `[[files]]`, is a table that may occur several times.
`KEY` in a heading stands for one of several names. For example, the row `container` of an earlier table says which names are
possible in `[container.KEY]`.

{COLUMNS} If the default depends on other values, the column *meaning* describes it.

These words occur in several tables:

- *Wheel*: a Python package in the file format that pip installs.
- *Target*: the architecture of the machines that use the wheel.
- *Host*: the machine that runs the build.
- *Root*: the Debian file system in which a build runs.
- *Source tree*: the folder with the unpacked source of the package.
- *Tree*: a folder of files that a recipe builds instead of a wheel, for example an LLVM installation. Builds of other
  recipes use it.
- *Digest*: a sha256.
- *Lock*: a file that pins packages by version and digest.
- *Build id*: the digest of everything that determines a build. If an input changes, the build id changes.
- *Python index*: PyPI, or the index in the variable `GRACEFARM_PYTHON_INDEX`.
- *sm value*: an architecture of NVIDIA GPUs. For example, `90` is compute capability 9.0 (H100, H200, GH200). `90a` is code
  for exactly this architecture, and `100f` is code for a family of architectures.
- *PTX*: code that NVIDIA's driver compiles for newer GPUs.
- *Gate*: a check that a wheel must pass ([the gates](audit.md)).
- *Smoke test*: a test that installs the wheel in a new environment, imports its modules, and runs smoke.py of the recipe.
- *Pattern*: a file name with wildcards, for example `*_sm90.cu`."""

DEPLOY_INTRO = f"""\
This page lists every key of deploy.toml. `deploy init` writes this file. [Nodes, and the plan](deploy.md) describes how
`deploy` uses it. A key that is not listed is an error.

A name in double brackets, such as `[[group]]`, is a table that may occur several times. {COLUMNS} If the default depends on
other values, the column *meaning* describes it.

These words occur in several tables:

- *Node*: a machine with GPUs that runs a part of the model.
- *Engine*: the program that runs the model, which is vLLM or Aphrodite.
- *Head*: the first node of deploy.toml. The main process of the engine and its HTTP server run there.
- *Set*: a list of wheels that are installed together: the engine, and everything that the engine requires.
- *Shared folder*: a folder on a file system that all nodes have mounted.
- *Ray*: a program that connects nodes and starts processes on them.
- *Planner*: the part of `deploy` that decides how the GPUs share the model (`deploy plan`).
- *Replica*: one copy of the model's layers.
- *Stage*: a group of GPUs that hold the same layers.
- *Experts*: the parts of a layer in a mixture-of-experts model. Each token uses only some of them."""

DOCUMENTS_INTRO = f"""\
This page lists every key of the JSON documents that gracefarm's programs write or upload.

Each document has a section. The first table of a section lists the top-level keys. Each further heading names the keys
whose values the next table describes. For example, `gpu.comparisons` is the key `comparisons` in the object `gpu`.

{COLUMNS} If there is no default and null is one of the types, an absent key means null. If there is no default and null is
not one of the types, an absent key means an empty string, list or object.

These words occur in several tables:

- *GRACEFARM_HOME*: the folder in the environment variable of this name. By default, it is usually `~/.cache/gracefarm`.
- *Recipe*: the description of how one wheel is built.
- *Stack*: the Python, torch, CUDA and compilers for a build.
- *Digest*: a sha256.
- *Target*: the architecture of the machines that use the wheel.
- *Python index*: PyPI, or the index in the variable `GRACEFARM_PYTHON_INDEX`.
- *sm value*: an architecture of NVIDIA GPUs, for example `90` for H100, H200 and GH200.
- *Device code*: the code in a wheel that runs on the GPU.
- *PTX*: device code that NVIDIA's driver compiles for newer GPUs.
- *Gate*: a check that a wheel must pass ([the gates](audit.md)).
- *Smoke test*: a test that installs the wheel in a new environment, imports its modules, and runs smoke.py of the recipe."""


def pages() -> dict[str, str]:
    """Name to text of each generated page."""
    return {
        **{f"cli-{program}.md": _command_line(program) for program in PROGRAMS},
        "files.md": SchemaPage(title="Files of a project", intro=FILES_INTRO, sections=FILES, toml=True).text(),
        "deploy-toml.md": SchemaPage(title="deploy.toml", intro=DEPLOY_INTRO, sections=DEPLOY_FILE, toml=True).text(),
        "documents.md": SchemaPage(title="JSON documents", intro=DOCUMENTS_INTRO, sections=DOCUMENTS, toml=False).text(),
    }


def _command_line(program: str) -> str:
    group: click.Group = importlib.import_module(f"{program}.cli").cli
    sections = [f"# `{program}`", NOTE, "Every command accepts `-h` or `--help`, and `--json` before or after its name."]
    for path, command in _walk(group, (program,)):
        context = _context(path, group)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        if len(path) > 1:
            sections.append(f"## {' '.join(path)}")
        sections.append(f"```text\n{text}\n```")
    return "\n\n".join(sections) + "\n"


def _context(path: Sequence[str], group: click.Group) -> click.Context:
    context = click.Context(group, info_name=path[0], terminal_width=WIDTH, **group.context_settings)
    command: click.Command | None = group
    for name in path[1:]:
        assert isinstance(command, click.Group)
        command = command.get_command(context, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=context)
    return context


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and all its subcommands, each with the words of its command line."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from _walk(subcommand, (*path, name))


def main() -> None:
    """Write the schemas and the pages."""
    for schemas in (upkeep.schemas(), documents.schemas(), plan.schemas()):
        for name, text in schemas.items():
            atomic_write(FOLDER.parent / "schema" / f"{name}.json", text)
    for name, text in pages().items():
        atomic_write(FOLDER / name, text)


if __name__ == "__main__":
    main()
