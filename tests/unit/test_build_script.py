"""What is read out of a package's build script, without running it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from builder.compiling import build_script
from builder.compiling.build_script import BuildScript

GUESSES_A_WHEEL = """
import os
import urllib.request
from wheel.bdist_wheel import bdist_wheel
FORCE_BUILD = os.getenv("THING_FORCE_BUILD", "FALSE") == "TRUE"
SKIP_CUDA = os.getenv("THING_SKIP_CUDA", "FALSE") == "TRUE"

class CachedWheel(bdist_wheel):
    def run(self):
        if FORCE_BUILD:
            return super().run()
        urllib.request.urlretrieve("https://example.org/thing.whl", "thing.whl")
"""


def script(tmp_path: Path, text: str, **files: str) -> BuildScript:
    for name, content in {"setup.py": text, **{f"{name}.py": content for name, content in files.items()}}.items():
        (tmp_path / name).write_text(textwrap.dedent(content))
    return build_script.read(tmp_path)


def test_the_variable_that_keeps_the_script_from_its_download_is_named(tmp_path: Path) -> None:
    (call,) = script(tmp_path, GUESSES_A_WHEEL).downloads()
    assert (call.what, str(call.place)) == ("https://example.org/thing.whl", "setup.py:12")
    assert (call.reached, call.switch) == (True, ("THING_FORCE_BUILD", "TRUE"))
    assert "THING_SKIP_CUDA" not in call.avoided_by
    (again,) = build_script.read(tmp_path).downloads({"THING_FORCE_BUILD": "TRUE"})
    assert (again.reached, dict(again.avoided_by)) == (False, {})


def test_a_condition_around_a_download_is_followed_through_functions_and_callers(tmp_path: Path) -> None:
    text = """
    import os, subprocess
    from os import environ as variables
    def flag(name, default="0"):
        return variables.get(name, default).lower() in ("1", "on")
    def clone():
        subprocess.check_call(["git", "clone", "https://example.org/thing.git"])
    if not (flag("USE_SYSTEM_THING") or unknown()):
        clone()
    """
    found = script(tmp_path, text)
    (call,) = found.downloads()
    assert call.what == "`git clone https://example.org/thing.git`"
    assert call.switch == ("USE_SYSTEM_THING", "1")
    assert [variable.name for variable in found.variables()] == ["USE_SYSTEM_THING"]


def test_a_download_that_is_off_unless_it_is_asked_for_is_not_reached(tmp_path: Path) -> None:
    text = 'import os, requests\nif "WITH_DATA" in os.environ:\n    requests.get("https://example.org/data")\n'
    assert [call.reached for call in script(tmp_path, text).downloads()] == [False]


def test_a_download_that_no_variable_avoids_names_none(tmp_path: Path) -> None:
    text = 'import os\nfrom urllib.request import urlopen\nif os.path.exists("x"):\n    urlopen("https://example.org/data")\n'
    (call,) = script(tmp_path, text).downloads()
    assert (call.reached, dict(call.avoided_by)) == (True, {})


def test_variables_are_read_by_every_way_to_the_environment_and_from_local_modules(tmp_path: Path) -> None:
    text = """
    import os
    import helper
    from os import getenv
    A = os.environ["A"]
    B = getenv("B", "2;3")
    KEY = "C"
    C = os.environ.get(KEY, default=None)
    D = "D" in os.environ
    comment = 'os.environ["NOT_READ"]'
    """
    found = script(tmp_path, text, helper="import os\nE = os.environ.get(f\"{'E'}\")\n")
    assert {variable.name: variable.default for variable in found.variables()} == {
        **dict.fromkeys(("A", "C", "D", "E")),
        "B": "2;3",
    }
    assert str(found.variables()[-1].place) == "helper.py:2"


def test_extensions_have_their_sources_below_the_tree(tmp_path: Path) -> None:
    text = """
    import os
    from pathlib import Path
    from torch.utils.cpp_extension import CUDAExtension
    here = os.path.dirname(os.path.abspath(__file__))
    name = "thing_cuda"
    sources = ["csrc/a.cpp", os.path.join(here, "csrc", "b.cu")]
    CUDAExtension(name=name, sources=sources + [str(Path(here) / "csrc" / "c.cu")], include_dirs=[Path(here) / "third" / "x"])
    for other in find():
        CUDAExtension(other, [other + ".pyx"])
    """
    first, second = script(tmp_path, text).extensions()
    assert (first.name, first.kind) == ("thing_cuda", "CUDAExtension")
    assert first.sources == ("csrc/a.cpp", "csrc/b.cu", "csrc/c.cu")
    assert first.includes == ("third/x",)
    assert (second.name, second.sources) == ("", ())


def test_a_script_that_is_no_python_of_today_says_nothing(tmp_path: Path) -> None:
    assert script(tmp_path, "print 'python 2'\n").scripts == ()


def test_a_name_that_is_set_by_itself_ends(tmp_path: Path) -> None:
    text = 'import os, requests\nbase = base + "/x"\nif base == os.getenv("A"):\n    requests.get(base + "/y")\n'
    (call,) = script(tmp_path, text).downloads()
    assert call.what == "requests.get"
