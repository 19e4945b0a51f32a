"""`builder certify`: digests of device code by the real nvcc and cuobjdump, and reports from a GPU that is none.

The GPU is a fake: a torch that claims one, and a smoke_gpu.py that computes nothing. What a real one computed is in
docs/explanation/benchmarks.md.
"""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder.audit import device_digest
from builder.audit.cuobjdump import UnreadableError
from builder.box import gpu
from builder.cli.options import plan_of
from builder.ground import environment
from builder.planning import stack
from builder.planning.stack import host_arch
from builder.proof import record
from builder.proof.record import BuiltFile, Record
from gracefarm.files import sha256_file
from tests.conftest import Farm
from tests.integration.host_kit import called, fake_torch, own
from tests.integration.test_environment import make_wheel

__all__ = ["own"]

KERNELS = """
namespace { __global__ void hidden(int *out, bool flag) { *out = flag ? 2 : 3; } }
__constant__ float table[4] = {1, 2, 3, 4};
__device__ int first = 7;
__device__ int second = 8;
__global__ void scaled(float *out) { out[0] = table[out != nullptr] * first; }
void launch(int *out) { hidden<<<1, 1>>>(out, true); }
"""


@pytest.fixture(scope="module")
def toolkit(shared_home: Path) -> Path:
    """The locked CUDA of stack cu130, as CUDA_HOME."""
    loaded = stack.load(Path(__file__).parents[2] / "stacks", "cu130")
    from builder.planning.settings import load

    (nvcc,) = environment.ensure_toolchain(loaded, host_arch(), load()).glob("nvidia/cu*/bin/nvcc")
    return nvcc.parents[1]


def wheel_of(folder: Path, toolkit: Path, *sources: str, options: tuple[str, ...] = (), tag: str = "py3-none-any") -> Path:
    """A wheel with a shared object for each source, compiled in this folder."""
    folder.mkdir(parents=True)
    place = make_wheel(folder / "dist", "thing", "1.0", {"thing.py": ""}, tag)
    for number, source in enumerate(sources):
        (folder / "kernels.cu").write_text(source)
        library = folder / f"_{number}.so"
        compiler = [toolkit / "bin/nvcc", "-allow-unsupported-compiler", "-Xcompiler=-fPIC"]
        codes = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_100f,code=sm_100f"]
        command = [*compiler, *codes, *options, "-c", folder / "kernels.cu", "-o", folder / "kernels.o"]
        subprocess.run(command, check=True)
        subprocess.run(["g++", "-shared", folder / "kernels.o", "-o", library], check=True)
        with zipfile.ZipFile(place, "a") as archive:
            archive.write(library, f"thing_{number}.so")
    return place


def digests(wheel: Path, toolkit: Path) -> dict[str, str]:
    return device_digest.of_wheel(wheel, toolkit / "bin/cuobjdump")


def test_a_digest_holds_what_a_gpu_computes_and_nothing_else(tmp_path: Path, toolkit: Path) -> None:
    before = digests(wheel_of(tmp_path / "before", toolkit, KERNELS), toolkit)
    assert sorted(before) == ["100f", "90"]
    assert digests(wheel_of(tmp_path / "another" / "place", toolkit, KERNELS), toolkit) == before
    lines = digests(wheel_of(tmp_path / "lines", toolkit, KERNELS, options=("-lineinfo",)), toolkit)
    assert lines["90"] == before["90"]
    changes = {
        "an instruction": ("? 2 : 3", "? 2 : 4"),
        "a constant": ("{1, 2, 3, 4}", "{1, 2, 3, 5}"),
        "a variable's initial value": ("first = 7", "first = 9"),
        "which variable a kernel reads": ("* first", "* second"),
    }
    for number, (what, (old, new)) in enumerate(changes.items()):
        assert old in KERNELS
        after = digests(wheel_of(tmp_path / str(number), toolkit, KERNELS.replace(old, new)), toolkit)
        assert after["90"] != before["90"], what
        assert after["100f"] != before["100f"], what


ASSERTS = """
#include <cassert>
__device__ int first = 7;
__device__ char path[] = "PLACE";
__global__ void checked(int *out) { assert(out[1] == first); assert(out[2]); out[0] = path[out[3]]; }
"""


def test_the_folder_of_a_source_in_an_assert_does_not_count(tmp_path: Path, toolkit: Path) -> None:
    def of(folder: str, source: str) -> dict[str, str]:
        return digests(wheel_of(tmp_path / folder, toolkit, source), toolkit)

    before = of("a", ASSERTS)
    assert of("another/place/with/a/longer/path", ASSERTS) == before
    changes = {
        "the line of an assert": ("__device__ int first", "\n__device__ int first"),
        "the text of an assert": ("assert(out[2])", "assert((out[2]))"),
        "a variable's initial value": ("first = 7", "first = 9"),
        "a file name": ("#include <cassert>", '#include <cassert>\n#line 3 "/a/other.cu"'),
    }
    for number, (what, (old, new)) in enumerate(changes.items()):
        assert old in ASSERTS
        after = of(str(number), ASSERTS.replace(old, new))
        assert after["90"] != before["90"], what
        assert after["100f"] != before["100f"], what
    # A variable of the source that holds a path is a value like any other.
    assert of("b", ASSERTS.replace("PLACE", "/a/k.cu")) != of("c", ASSERTS.replace("PLACE", "/b/k.cu"))


def test_the_order_of_objects_does_not_count(tmp_path: Path, toolkit: Path) -> None:
    other = "__global__ void other(int *out) { *out = 1; }"
    there, back = wheel_of(tmp_path / "1", toolkit, KERNELS, other), wheel_of(tmp_path / "2", toolkit, other, KERNELS)
    assert digests(there, toolkit) == digests(back, toolkit)
    assert digests(there, toolkit) != digests(wheel_of(tmp_path / "3", toolkit, KERNELS), toolkit)


def test_a_wheel_that_cannot_be_read_is_an_error_and_one_without_device_code_has_no_digest(
    tmp_path: Path, toolkit: Path
) -> None:
    assert digests(make_wheel(tmp_path, "plain", "1.0", {"plain.py": ""}), toolkit) == {}
    (tmp_path / "broken.whl").write_bytes(b"PK no zip")
    with pytest.raises(UnreadableError, match="cannot be read"):
        digests(tmp_path / "broken.whl", toolkit)


SCRIPT = """
NEGATIVE_CONTROL = "a sum that is off by one is refused"
COMPARISONS = [{{"name": "sum", "error": {error}, "tolerance": 1e-3}}]
print("computed")
"""


def prepared(farm: Farm, own: Path, tmp_path: Path, toolkit: Path, patch: pytest.MonkeyPatch, script: str) -> list[str]:
    """A wheel with device code, its recipe, a fake GPU; the arguments of `certify`."""
    patch.setattr(gpu, "devices", lambda: [Path("/dev/null")])
    patch.chdir(tmp_path)
    place = fake_torch(own, tmp_path / "venv", version="2.11.0", cuda="13.0")
    farm.recipe("thing", {"setup.py": ""}, name="thing", stack="cu130", smoke={"imports": ["thing"]})
    (farm.settings.project / "recipes/thing/smoke_gpu.py").write_text(script)
    wheel = wheel_of(tmp_path / "wheel", toolkit, KERNELS, tag=f"py3-none-linux_{host_arch().value}")
    return [
        *("certify", str(wheel), "--recipe", "thing", "--toolchain", "host"),
        *("--environment", str(place), "--cuda", str(toolkit)),
    ]


def built(farm: Farm, wheel: Path, toolkit: Path, filename: str) -> None:
    """A record of this machine about a wheel with the device code of `wheel`."""
    planned = plan_of("thing", None, "aarch64", farm.settings)
    kept = Record(
        build_id=filename.encode().hex().ljust(64, "0")[:64],
        recipe="thing",
        name="thing",
        version="1.0",
        stack="cu130",
        inputs=json.loads(json.dumps(planned.inputs)),
        outcome="built",
        wheel=BuiltFile(filename=filename, sha256=sha256_file(wheel), size=1),
        device_digests=digests(wheel, toolkit),
        finished=record.now(),
    )
    record.path(farm.settings, kept.build_id).parent.mkdir(parents=True)
    (record.folder(farm.settings, kept.build_id) / "dist").mkdir()
    record.write(kept, farm.settings)


def test_a_report_certifies_the_twin_with_the_same_device_code_and_no_other(
    farm: Farm, own: Path, tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = prepared(farm, own, tmp_path, toolkit, monkeypatch, SCRIPT.format(error=2e-4))
    assert called(farm, monkeypatch, *arguments) == (0, "")
    name = Path(arguments[1]).name
    given = json.loads((tmp_path / f"{name}.gpu.json").read_text())
    assert (given["gpu"], given["sm"]) == ("a fake GPU", "90")
    assert given["comparisons"] == [{"name": "sum", "error": 2e-4, "tolerance": 1e-3}]

    monkeypatch.setenv("GRACEFARM_SETTINGS", str(tmp_path / "settings.toml"))
    accept = ("certify", "--accept", f"{name}.gpu.json")
    assert called(farm, monkeypatch, *accept) == (3, "this machine has no signing key")
    assert called(farm, monkeypatch, "key", "create") == (0, "")
    changed = wheel_of(tmp_path / "changed", toolkit, KERNELS.replace("? 2 : 3", "? 2 : 4"))
    built(farm, changed, toolkit, "thing-1.0-cp311-cp311-linux_aarch64.whl")
    code, cause = called(farm, monkeypatch, *accept)
    assert code == 32
    assert "names these digests: sm_90" in cause
    assert not (farm.settings.home / "certificates").exists()

    twin = wheel_of(tmp_path / "twin", toolkit, KERNELS, options=("-lineinfo",))
    built(farm, twin, toolkit, "thing-1.0-cp313-cp313-linux_aarch64.whl")
    capsys.readouterr()
    assert called(farm, monkeypatch, *accept) == (0, "")
    sentence = (
        f"device code for sm_90 certified on a fake GPU by its twin {name}, which has the same device code: "
        "1 comparison; host code is not covered"
    )
    assert capsys.readouterr().out.strip().endswith(f"thing-1.0-cp313-cp313-linux_aarch64.whl: {sentence}")
    (kept,) = (farm.settings.home / "certificates").iterdir()
    assert kept.stem == given["device_digests"]["90"]
    assert called(farm, monkeypatch, "show", "thing") == (0, "")
    assert sentence in capsys.readouterr().out

    # A certificate that was changed after the signature counts as none.
    kept.write_text(kept.read_text().replace("a fake GPU", "NVIDIA H100"))
    assert called(farm, monkeypatch, "show", "thing") == (0, "")
    assert "certified" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        (SCRIPT.format(error=2e-3), 31, "computes sum with an error of 0.002, but at most 0.001 is allowed"),
        ("assert False, 'off by one'\n", 31, "failed its test on a fake GPU: AssertionError: off by one"),
        ("print('computed')\n", 32, "has no comparisons or no negative control"),
        ("COMPARISONS = [{'name': 'sum'}]\n", 31, "wrote no valid list of comparisons: comparisons.0.error: Field required"),
        (SCRIPT.format(error="float('nan')"), 31, "wrote no valid list of comparisons: comparisons.0.error"),
    ],
)
def test_a_wrong_result_is_not_certified(
    farm: Farm, own: Path, tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int, words: str
) -> None:
    arguments = prepared(farm, own, tmp_path, toolkit, monkeypatch, script)
    ended, cause = called(farm, monkeypatch, *arguments)
    assert ended == code, cause
    assert words in cause
    assert not list(tmp_path.glob("*.gpu.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a report of `builder certify`: the file: Invalid JSON"),
        ("[]", "is not a report of `builder certify`: the file: Input should be an object"),
        ('{"wheel": 1}', "is not a report of `builder certify`: wheel: Input should be"),
    ],
)
def test_a_file_that_is_not_a_report_is_one_sentence(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / "report.json").write_text(text)
    code, cause = called(farm, monkeypatch, "certify", "--accept", str(tmp_path / "report.json"))
    assert code == 3
    assert words in cause
