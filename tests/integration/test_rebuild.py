"""`builder verify --rebuild`: real builds in two folders; what embeds the time shows where."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder.flow import rebuild
from builder.flow.rebuild import Difference
from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value


def built(farm: Farm, name: str, *arguments: str) -> Path:
    done = farm.run("build", name, *arguments)
    assert done.code == 0, done.said
    return Path(done.out.strip())


def test_a_c_extension_builds_the_same_again_byte_by_byte(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})
    wheel = built(farm, "tiny_c", "--target", NATIVE)
    done = farm.run("verify", str(wheel), "--rebuild")
    assert done.code == 0, done.said
    assert done.out.strip() == "identical: all bytes are the same"
    assert not list(farm.settings.home.glob("builds/*/rebuild")), "the second build is gone"


@pytest.mark.slow
def test_a_cuda_extension_differs_in_device_code_at_most(farm: Farm) -> None:
    farm.recipe(
        "tiny_cuda",
        projects.tree("tiny_cuda"),
        name="tiny-cuda",
        stack="cu130",
        build={"cuda": True, "memory_per_job": "1GiB"},
        smoke={"imports": ["tiny_cuda", "tiny_cuda._core"]},
    )
    built(farm, "tiny_cuda")
    done = farm.run("verify", "tiny_cuda", "--rebuild", "--json")
    assert done.code == 0, done.said
    assert json.loads(done.out.splitlines()[-1])["verdict"] in ("identical", "device code only")


def test_a_package_that_embeds_the_time_shows_file_and_section(farm: Farm) -> None:
    files = projects.tree("tiny_c")
    clock = "import time\nfrom pathlib import Path\n"
    clock += "Path('core.c').write_text(Path('core.c').read_text() + f'\\nconst char stamp[] = \"{time.time()}\";\\n')\n"
    clock += "Path('tiny_c/when.py').write_text(f'now = {time.time()}\\n')\n"
    setup = files["setup.py"]
    files["setup.py"] = clock + (setup if isinstance(setup, str) else setup.decode())
    farm.recipe("tiny_c", files, name="tiny-c", smoke={"imports": ["tiny_c"]})
    built(farm, "tiny_c", "--target", NATIVE)
    done = farm.run("verify", "tiny_c", "--rebuild")
    assert done.code == 32, done.said
    assert re.search(r"differs: .*tiny_c/_core\S+ \(\.rodata\)", done.said), done.said
    assert "tiny_c/when.py (content, from byte" in done.said
    assert "RECORD" not in done.out, "which only follows"


def test_a_wheel_that_this_project_does_not_make_is_not_compared(farm: Farm, tmp_path: Path) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    wheel = shutil.copy(built(farm, "tiny", "--target", NATIVE), tmp_path)
    farm.recipe("tiny", projects.backend("x = 1\nreturn wheel(wheel_directory)"))
    done = farm.run("verify", str(wheel), "--rebuild")
    assert done.code == 3, done.said
    assert "which this project does not produce on this machine" in done.said


# --- the comparison itself ---------------------------------------------------------------------------------------------------


def compiled(folder: Path, name: str, text: str) -> bytes:
    """A shared object with a section as nvcc makes one, from a real compiler."""
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(text)
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,--build-id", "-o", library, source], check=True)
    return library.read_bytes()


def device(content: str, more: str = "") -> str:
    return f'__attribute__((section(".nv_fatbin"))) const char code[] = "{content}";\n{more}'


def wheel_of(place: Path, files: dict[str, bytes]) -> Path:
    place.parent.mkdir(exist_ok=True)
    rows = "".join(f"{name},{hash(data)},\n" for name, data in files.items())
    with zipfile.ZipFile(place, "w") as archive:
        for name, data in {**files, "x-1.0.dist-info/RECORD": rows.encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return place


def compared(folder: Path, first: dict[str, bytes], second: dict[str, bytes]) -> rebuild.Comparison:
    name = "x-1.0-py3-none-any.whl"
    return rebuild.compare(wheel_of(folder / "1" / name, first), wheel_of(folder / "2" / name, second))


def test_other_cubins_alone_are_device_code_only(tmp_path: Path) -> None:
    one, other = compiled(tmp_path, "a", device("one")), compiled(tmp_path, "a", device("two"))
    found = compared(tmp_path, {"x.so": one}, {"x.so": other})
    # The linker's build id is a hash of all this and differs with it.
    assert found.verdict == "device code only"
    assert found.differences == (Difference(file="x.so", where=".nv_fatbin", device=True),)


def test_host_code_is_never_taken_for_device_code(tmp_path: Path) -> None:
    one = compiled(tmp_path, "a", device("one", "int f(void) { return 1; }"))
    other = compiled(tmp_path, "a", device("two", "int f(void) { return 2; }"))
    found = compared(tmp_path, {"x.so": one}, {"x.so": other})
    assert found.verdict == "differs"
    assert {difference.where for difference in found.differences} == {".text", ".nv_fatbin"}
    assert "x.so (.text)" in found.sentence


def test_the_process_id_of_nvcc_in_a_symbols_name_is_not_host_code(tmp_path: Path) -> None:
    text = device("one", "int f(void) { return 1; }")
    objects = [compiled(tmp_path, f"tmpxft_0000001{number}_00000000-6_kernel.cudafe1", text) for number in (1, 2)]
    found = compared(tmp_path, {"x.so": objects[0]}, {"x.so": objects[1]})
    assert found.verdict == "device code only"
    assert found.differences == (Difference(file="x.so", where=".strtab: names of nvcc's temporary files", device=True),)
    renamed = compiled(tmp_path, "tmpxft_00000011_00000000-6_kermel.cudafe1", text)
    assert compared(tmp_path, {"x.so": objects[0]}, {"x.so": renamed}).verdict == "differs"


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ({"a.py": b"1"}, {"a.py": b"1", "b.py": b""}, ("b.py", "only in the second")),
        ({"a.py": b"1", "b.py": b""}, {"a.py": b"1"}, ("b.py", "only in the first")),
        ({"a.py": b"1", "b.py": b""}, {"b.py": b"", "a.py": b"1"}, ("the archive", "order of the files")),
        ({"a.py": b"one"}, {"a.py": b"ono"}, ("a.py", "content, from byte 2")),
        ({"a.so": b"\x7fELF broken"}, {"a.so": b"\x7fELF broker"}, ("a.so", "content, from byte 10")),
    ],
)
def test_what_is_not_the_same_is_named(
    tmp_path: Path, first: dict[str, bytes], second: dict[str, bytes], where: tuple[str, str]
) -> None:
    found = compared(tmp_path, first, second)
    assert found.verdict == "differs"
    assert where in [(difference.file, difference.where) for difference in found.differences]


def test_an_archive_packed_otherwise_is_said_to_be(tmp_path: Path) -> None:
    place = wheel_of(tmp_path / "1" / "x-1.0-py3-none-any.whl", {"a.py": b"1" * 100})
    other = tmp_path / "2" / place.name
    other.parent.mkdir()
    with zipfile.ZipFile(place) as archive, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(zipfile.ZipInfo(name), archive.read(name), zipfile.ZIP_DEFLATED)
    found = rebuild.compare(place, other)
    assert found.differences == (Difference(file="the archive", where="times, modes or compression"),)
