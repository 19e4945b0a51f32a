"""Recipes and stacks as data."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from builder.cli.upkeep import schemas
from builder.planning import recipe, stack
from builder.planning.sources import SdistSource
from gracefarm import tables
from gracefarm.errors import ConfigError, ExitCode

REPOSITORY = Path(__file__).parent.parent.parent
GOOD = """name = "thing"
version = "1.0"
license = "MIT"

[source]
kind = "sdist"
name = "thing"
version = "1.0"
sha256 = "{digest}"

[[files]]
url = "https://example.org/a"
sha256 = "{digest}"
path = "a"

[[files]]
url = "https://example.org/b"
sha256 = "{digest}"
path = "b"

[smoke]
imports = ["thing"]
""".format(digest="0" * 64)


def write(folder: Path, text: str) -> Path:
    (folder / "thing").mkdir()
    (folder / "thing" / "recipe.toml").write_text(text)
    return folder


def test_every_committed_recipe_and_stack_fits_the_schema() -> None:
    for name in recipe.names(REPOSITORY / "recipes"):
        loaded = recipe.load(REPOSITORY / "recipes", name)
        assert stack.load(REPOSITORY / "stacks", loaded.data.stack).data.sm


def test_the_median_recipe_has_at_most_18_lines() -> None:
    """Lines that are neither empty nor a comment."""
    texts = [(REPOSITORY / "recipes" / name / "recipe.toml").read_text() for name in recipe.names(REPOSITORY / "recipes")]
    assert statistics.median(len(re.findall(r"^ *[^ #\n]", text, re.MULTILINE)) for text in texts) <= 18


def test_an_sdist_has_the_name_and_the_version_of_its_recipe_unless_it_says_otherwise(tmp_path: Path) -> None:
    short = GOOD.replace('kind = "sdist"\nname = "thing"\nversion = "1.0"\n', 'kind = "sdist"\n')
    assert short != GOOD
    others = short.replace('kind = "sdist"\n', 'kind = "sdist"\nname = "other"\nversion = "1"\n')
    for text, wanted in ((GOOD, ("thing", "1.0")), (short, ("thing", "1.0")), (others, ("other", "1"))):
        shutil.rmtree(tmp_path / "thing", ignore_errors=True)
        source = recipe.load(write(tmp_path, text), "thing").data.source
        assert isinstance(source, SdistSource)
        assert (source.name, source.version) == wanted


def test_any_spelling_of_the_name_finds_the_recipe(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert recipe.load(tmp_path, "Thing").data.name == "thing"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('license = "MIT"', 'licence = "MIT"', 3, "unknown key 'licence'"),
        ('kind = "sdist"', 'kind = "svn"', 5, "'source'"),
        ('version = "1.0"\nsha', 'verison = "1.0"\nsha', 8, "source.verison"),
        ('path = "b"', 'path = "../b"', 19, "without '..'"),
        ('path = "b"', 'paths = "b"', 19, "paths"),
        (f'sha256 = "{"0" * 64}"\n\n[[', 'sha256 = "abc"\n\n[[', 9, "source.sha256"),
        ("imports =", "imports", 22, "recipe.toml"),
    ],
)
def test_an_error_names_file_and_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        recipe.load(tmp_path, "thing")
    assert words in caught.value.cause
    assert f":{line}:" in caught.value.cause or f"line {line}" in caught.value.cause


def test_a_recipe_answers_to_its_distributions_name(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.toml").write_text(GOOD.replace('name = "thing"', 'name = "Some.Thing"', 1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.toml").write_text("name =")
    assert recipe.load(tmp_path, "some_thing").key == "other"
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "recipe.toml").write_text((tmp_path / "other" / "recipe.toml").read_text())
    with pytest.raises(ConfigError, match="unknown recipe 'some_thing'"):
        recipe.load(tmp_path, "some_thing")


def test_the_page_of_errors_lists_the_exit_codes() -> None:
    text = (REPOSITORY / "docs" / "reference" / "errors.md").read_text()
    listed = {int(code): name for code, name in re.findall(r"^\| (\d+) \| (\w+) \|", text, re.MULTILINE)}
    assert listed == {int(exit_code): exit_code.name.lower() for exit_code in ExitCode}


def test_the_nearest_key_is_offered(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace("license", "licence"))
    with pytest.raises(ConfigError) as caught:
        recipe.load(tmp_path, "thing")
    assert caught.value.remedy == "did you mean 'license'?"


@pytest.mark.parametrize(("text", "size"), [("3GiB", 3 << 30), ("0.5 MiB", 1 << 19)])
def test_sizes(text: str, size: int) -> None:
    assert tables.parse_size(text) == size


@pytest.mark.parametrize("text", ["3GB", "GiB", "-1GiB", "3"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        tables.parse_size(text)


def test_committed_schemas_are_those_of_the_code() -> None:
    for name, text in schemas().items():
        committed = (REPOSITORY / "docs" / "schema" / f"{name}.json").read_text()
        assert json.loads(committed) == json.loads(text), f"run `builder schema --write docs/schema` for {name}"
