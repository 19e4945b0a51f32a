"""`builder stack new`: a stack out of what an index says of a torch. The index is of the test's own, the resolver is uv."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from builder.planning import pins, stack
from builder.planning.stack import Arch, LoadedStack
from tests import projects
from tests.conftest import Farm
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Served, Server

UPLOADED = "2026-01-05T12:00:00Z"
CPYTHON = ("manylinux_2_28_aarch64", "manylinux_2_28_x86_64")
BOTH = tuple(f"py3-none-{platform}" for platform in CPYTHON)
LIKE = """
name = "tiny"
python = "3.11"
cuda = "13.0"
sm = ["90"]
glibc = { aarch64 = "2_34", x86_64 = "2_34" }
root_of = "cu130"
[torch]
version = "9.0.0"
cuda = "13.0"
[environment]
requirements = ["torch==9.0.0", "wheel"]
[toolchain]
gcc = 12
requirements = ["nvidia-cuda-nvcc==13.0.88", "cmake"]
path = ["cmake/data/bin"]
"""


def publish(server: Server, name: str, version: str, tags: tuple[str, ...], requires: tuple[str, ...] = ()) -> None:
    """Wheels of one version on a project's page, only with their metadata: a lock downloads no wheel."""
    page = f"/simple/{name}/"
    before = json.loads(server.served[page].data)["files"] if page in server.served else []
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    extras = {text.partition('extra == "')[2].rstrip('"') for text in requires} - {""}
    lines += [*(f"Provides-Extra: {extra}" for extra in sorted(extras)), *(f"Requires-Dist: {text}" for text in requires)]
    metadata = ("\n".join(lines) + "\n").encode()
    for tag in tags:
        filename = f"{name.replace('-', '_')}-{version}-{tag}.whl"
        before.append(
            {
                "filename": filename,
                "url": f"{server.url}/files/{filename}",
                "hashes": {"sha256": hashlib.sha256(filename.encode()).hexdigest()},
                "core-metadata": {"sha256": hashlib.sha256(metadata).hexdigest()},
                "upload-time": UPLOADED,
                "size": 1,
            }
        )
        server.served[f"/files/{filename}.metadata"] = Served(metadata)
    versions = sorted({file["filename"].split("-")[1] for file in before})
    content = {"meta": {"api-version": "1.1"}, "name": name, "versions": versions, "files": before}
    server.served[page] = Served(json.dumps(content).encode(), "application/vnd.pypi.simple.v1+json")


def of_pythons(*versions: str) -> tuple[str, ...]:
    return tuple(f"cp{version}-cp{version}-{platform}" for version in versions for platform in CPYTHON)


@pytest.fixture
def index(farm: Farm) -> Iterator[Server]:
    """torch 9.1.0 for CUDA 13.9, 9.0.0 for none, 8.0.0 for CUDA 12.8; and a stack `tiny` to begin from."""
    folder = farm.settings.project / "stacks" / "tiny"
    folder.mkdir()
    (folder / "stack.toml").write_text(LIKE)
    with fetch_kit.running() as server:
        publish(server, "torch", "9.1.0", of_pythons("311", "313", "314"), ("cuda-toolkit[cudart]==13.9.1", "brittle"))
        publish(server, "torch", "9.0.0", of_pythons("311", "313"))
        publish(server, "torch", "8.0.0", of_pythons("311"), ("nvidia-cuda-runtime-cu12==12.8.1",))
        publish(server, "torch", "7.0.0", of_pythons("310"), ("cuda-toolkit[cudart]==13.9.1",))
        publish(server, "brittle", "1.0", of_pythons("311", "313"))
        publish(server, "wheel", "1.0", ("py3-none-any",))
        publish(server, "cmake", "3.31.0", BOTH)
        publish(server, "nvidia-cuda-runtime-cu12", "12.8.1", BOTH)
        for name in ("nvcc", "crt", "runtime", "cccl"):
            for version in ("13.9.20", "13.9.31", "14.0.1"):
                publish(server, f"nvidia-cuda-{name}", version, BOTH)
        publish(server, "nvidia-cuda-cuobjdump", "14.0.1", BOTH)
        publish(server, "nvidia-nvvm", "13.9.20", BOTH)
        for toolkit, release in (("13.9.1", "13.9.20"), ("14.0.0", "14.0.1")):
            parts = [("cudart", "nvidia-cuda-runtime"), ("cccl", "nvidia-cuda-cccl")]
            parts += [("nvcc", name) for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")]
            requires = tuple(f'{name}=={release}.* ; extra == "{extra}"' for extra, name in parts)
            publish(server, "cuda-toolkit", toolkit, ("py3-none-any",), requires)
        yield server


def new(farm: Farm, index: Server, *arguments: str) -> tuple[int, str]:
    done = farm.run("stack", "new", *arguments, "--like", "tiny", GRACEFARM_PYTHON_INDEX=f"{index.url}/simple/")
    return done.code, done.said


def test_a_stack_is_what_the_index_says_of_its_torch(farm: Farm, index: Server) -> None:
    code, said = new(farm, index, "next", "--torch", "9.1")
    assert code == 0, said
    assert "torch 9.1.0, CUDA 13.9, root file system of cu130" in said
    assert "locked for Python 3.11, 3.13 " in said
    assert "no lock for Python 3.12: torch 9.1.0 has no wheel for it" in said
    assert (
        "no lock for Python 3.14: the requirements cannot be resolved for aarch64" in said
        or "no lock for Python 3.14: brittle 1.0 has no" in said
    )

    loaded = stack.load(farm.settings.project / "stacks", "next")
    table = tomllib.loads((loaded.folder / "stack.toml").read_text())
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    assert table["torch"] == {"version": "9.1.0", "cuda": "13.9"}
    assert table["environment"] == {"resolved_before": yesterday.isoformat(), "requirements": ["torch==9.1.0", "wheel"]}
    # The release of torch's own CUDA, neither its newest repair nor the newest release; the reader that it lacks is newer.
    parts = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
    compiler = [*(f"{part}==13.9.20" for part in parts), "nvidia-cuda-cuobjdump>=13.2"]
    assert table["toolchain"]["requirements"] == [*compiler, "cmake"]
    assert sorted(path.name for path in loaded.folder.iterdir()) == [
        "requirements-3.13.lock",
        "requirements.lock",
        "stack.toml",
    ]
    assert_whole(loaded)
    assert loaded.data.no_lock["3.12"] == "torch 9.1.0 has no wheel for it"
    assert set(loaded.data.no_lock) == {"3.10", "3.12", "3.13t", "3.14", "3.14t"}
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    planned = farm.run("plan", "tiny", "--stack", "next", "--python", "3.12")
    assert planned.code == 3, planned.said
    assert "stack next does not support Python 3.12: torch 9.1.0 has no wheel for it remedy: use a different" in planned.said
    assert loaded.root_lock == farm.settings.project / "stacks/cu130/root.lock"

    code, said = new(farm, index, "next", "--torch", "9.1.0")
    assert (code, "the stack next already exists" in said) == (2, True)


FREE_THREADED = tuple(f"cp314-cp314t-{platform}" for platform in CPYTHON)


def test_a_free_threaded_python_has_a_lock_if_all_its_wheels_exist(farm: Farm, index: Server) -> None:
    publish(index, "torch", "9.2.0", (*of_pythons("311", "314"), *FREE_THREADED), ("cuda-toolkit[cudart]==13.9.1",))
    code, said = new(farm, index, "next", "--torch", "9.2.0")
    assert code == 0, said
    assert "locked for Python 3.11, 3.14, 3.14t " in said
    lock = (farm.settings.project / "stacks/next/requirements-3.14t.lock").read_text()
    assert all(f"# torch-9.2.0-{tag}.whl\n" in lock for tag in FREE_THREADED)


def test_the_reason_names_what_has_no_wheel_for_a_free_threaded_python(farm: Farm, index: Server) -> None:
    requires = ("cuda-toolkit[cudart]==13.9.1", "brittle==2.0")
    publish(index, "torch", "9.2.0", (*of_pythons("311", "314"), *FREE_THREADED), requires)
    publish(index, "brittle", "2.0", of_pythons("311", "314"))
    code, said = new(farm, index, "next", "--torch", "9.2.0")
    assert code == 0, said
    assert "locked for Python 3.11, 3.14 " in said
    assert "no lock for Python 3.14t: brittle 2.0 has no wheel for Python 3.14t on aarch64, and no version with such" in said


def assert_whole(loaded: LoadedStack) -> None:
    """Both architectures of the lock have all that stack.toml asks for, torch's file of that architecture among it."""
    for arch in Arch:
        torch = {wheel.name: wheel for wheel in pins.wheels(loaded, arch)}["torch"]
        filename = f"torch-9.1.0-cp311-cp311-manylinux_2_28_{arch}.whl"
        assert torch.filename == filename
        assert torch.sha256 == hashlib.sha256(filename.encode()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("x", "--torch", "9.1.1"), 2, "has no torch 9.1.1 remedy: did you mean '9.1.0'?"),
        (("x", "--torch", "newest"), 2, "newest releases of torch on this index: 9.1.0, 9.0.0, 8.0.0, 7.0.0"),
        (("x", "--torch", "9.0.0"), 3, "the aarch64 wheel of torch 9.0.0 on the Python index has no CUDA"),
        (
            ("x", "--torch", "8.0.0"),
            3,
            "on the Python index requires nvidia-cuda-runtime-cu12, but no wheel contains the compiler",
        ),
        (("x", "--torch", "7.0.0"), 3, "torch 7.0.0 has no wheels for aarch64 and x86_64 with Python 3.11"),
        (("cu130", "--torch", "9.1.0"), 2, "the stack cu130 already exists"),
        (("../x", "--torch", "9.1.0"), 2, "'../x' is not a valid name for a stack"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_stack_that_cannot_be_leaves_nothing(
    farm: Farm, index: Server, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    stacks = farm.settings.project / "stacks"
    before = sorted(path.name for path in stacks.iterdir())
    ended, said = new(farm, index, *arguments)
    assert (ended, sentence in said) == (code, True), said
    assert sorted(path.name for path in stacks.iterdir()) == before


def test_a_root_that_does_not_fit_is_refused(farm: Farm, index: Server) -> None:
    place = farm.settings.project / "stacks" / "tiny" / "stack.toml"
    for old, text, sentence in (
        ('root_of = "cu130"', 'root_of = "cu13"', "unknown stack 'cu13'"),
        ('root_of = "cu130"', "", "give either [root] or root_of"),
        ("gcc = 12", "gcc = 14", "the root of cu130 has Python 3.11 and gcc 12"),
    ):
        place.write_text(LIKE.replace(old, text))
        code, said = new(farm, index, "x", "--torch", "9.1.0")
        assert (code, sentence in said) == (3, True), said
