"""requirements.lock as all three programs read it: pins, markers, file names, the line of an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.utils import canonicalize_name, parse_wheel_filename

from gracefarm import pins
from gracefarm.errors import ConfigError
from tests.conftest import REPOSITORY

A, B = "a" * 64, "b" * 64
LOCKS = [
    *REPOSITORY.glob("stacks/*/requirements.lock"),
    *REPOSITORY.glob("sets/*/requirements.lock"),
    *REPOSITORY.glob("deploy/data/*.lock"),
]


def test_a_pin_may_be_spread_over_lines_as_pip_compile_writes_it() -> None:
    text = f"""# title
--index-url https://host.example/simple

Ray[default]==2.60.0 ; python_version >= "3.11" \\
    --hash=sha256:{A} \\
    --hash sha256:{B}
    # via engine
typing_extensions==4.15.0 --hash=sha256:{B}  # via ray
"""
    ray, typing_extensions = pins.parse(text, "lock", options=True)
    assert (ray.name, ray.version, ray.sha256, ray.number) == ("ray", "2.60.0", {A, B}, 4)
    assert ray.applies({"python_version": "3.12"})
    assert not ray.applies({"python_version": "3.10"})
    assert (typing_extensions.name, typing_extensions.marker, typing_extensions.number) == ("typing-extensions", None, 8)


def test_what_says_the_same_has_the_same_text() -> None:
    (wide,) = pins.parse(f"  a==1 \\\n\n     --hash=sha256:{A}  \n".replace("\\\n\n", "\\\n"), "lock")
    (narrow,) = pins.parse(f"# comment\na==1 --hash=sha256:{A}", "lock")
    assert wide.text == narrow.text == f"a==1 --hash=sha256:{A}"


def test_a_comment_names_the_wheel_of_the_line_below_and_of_no_other() -> None:
    text = f"# a-1-py3-none-any.whl\na==1 --hash=sha256:{A}\nb==1 --hash=sha256:{B}\n# c-1-py3-none-any.whl\n# c is pure\n"
    assert [pin.filename for pin in pins.parse(f"{text}c==1 --hash=sha256:{A}", "lock")] == ["a-1-py3-none-any.whl", "", ""]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a==1", "--hash=sha256:… is missing"),
        (f"a==1 --hash=sha512:{A}{B}", "--hash=sha256:… is missing"),
        (f"a==1 --hash=sha256:{A}0", "--hash=sha256:… is missing"),
        (f"a>=1 --hash=sha256:{A}", "the version is not pinned with =="),
        (f"a==1,!=2 --hash=sha256:{A}", "the version is not pinned with =="),
        (f"a==1.* --hash=sha256:{A}", "the version is not pinned with =="),
        (f"a===1 --hash=sha256:{A}", "the version is not pinned with =="),
        (f"a --hash=sha256:{A}", "the version is not pinned with =="),
        (f"a @ https://host.example/a.whl --hash=sha256:{A}", "the version is not pinned with =="),
        (f"./a.whl --hash=sha256:{A}", "Expected package name"),
        (f"a==1 ; machine == 'x' --hash=sha256:{A}", "Expected a marker variable"),
        ("--index-url https://host.example", "--hash=sha256:… is missing"),
        ("-r other.txt", "--hash=sha256:… is missing"),
    ],
)
def test_what_pins_nothing_is_refused_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# title\nb==1 \\\n    --hash=sha256:{B}\n\n{line}\n")
    with pytest.raises(
        ConfigError, match=f"requirements.lock:5: the line does not pin a wheel: .*{reason}|:5: {reason}"
    ) as caught:
        pins.read(lock, remedy="fix it", repeat="again")
    assert (caught.value.remedy, caught.value.repeat) == ("fix it", "again")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_lock_that_cannot_be_read_is_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    lock = tmp_path / "requirements.lock"
    if content is not None:
        lock.write_bytes(content)
    with pytest.raises(ConfigError, match=r"requirements\.lock") as caught:
        pins.read(lock)
    assert caught.value.remedy == pins.REMEDY


def test_what_is_rendered_is_read_again() -> None:
    (pin,) = pins.parse(pins.render("a", "1.0+cu130", [B, A]), "lock")
    assert (pin.name, pin.version, pin.sha256) == ("a", "1.0+cu130", {A, B})


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: f"{lock.parent.name}/{lock.name}")
def test_every_lock_of_the_repository_is_read_whole(lock: Path) -> None:
    locked = pins.read(lock)
    assert sum(len(pin.sha256) for pin in locked) == lock.read_text().count("--hash=sha256:")
    for pin in locked:
        if pin.filename:
            name, version, _, _ = parse_wheel_filename(pin.filename)
            assert (name, str(version)) == (canonicalize_name(pin.name), pin.version)
