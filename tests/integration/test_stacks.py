"""The stacks that `builder stack new` made: a CUDA extension and a link with the driver on each, for both architectures."""

from __future__ import annotations

import pytest

from builder.planning import stack
from builder.planning.stack import Arch
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.test_build import record_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NEW = [name for name in stack.names(REPOSITORY / "stacks") if stack.load(REPOSITORY / "stacks", name).root_stack is not None]
TARGETS = stack.load(REPOSITORY / "stacks", "cu130").root.hosts[stack.host_arch()]
DRIVER_CU = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda.h>

static PyObject *parameters(PyObject *, PyObject *) {
    size_t count = 0;
    %s
    return PyLong_FromSize_t(count);
}

static PyMethodDef methods[] = {{"parameters", parameters, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_driver", nullptr, -1, methods};

PyMODINIT_FUNC PyInit__driver(void) { return PyModule_Create(&module); }
"""
CALL = {"13.2": "cuFuncGetParamCount(nullptr, &count);", "13.0": "cuMemGetInfo(&count, nullptr);"}
"By CUDA: a function of the driver, in 13.2 one that came with it."
DRIVER_EXTENSION = """
        Extension(
            "tiny_cuda._driver",
            ["driver.cu"],
            libraries=["cuda", "cudart", "stdc++"],
            library_dirs=[os.environ["CUDA_HOME"] + folder for folder in ("/lib64", "/lib64/stubs")],
        ),
    ],
    cmdclass"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NEW)
def test_a_cuda_extension_and_a_link_with_the_driver(farm: Farm, name: str, target: Arch) -> None:
    cuda = stack.load(REPOSITORY / "stacks", name).data.cuda
    files = projects.tree("tiny_cuda")
    setup = files["setup.py"]
    assert isinstance(setup, bytes)
    files["setup.py"] = setup.decode().replace("    ],\n    cmdclass", DRIVER_EXTENSION.lstrip("\n"))
    files["driver.cu"] = DRIVER_CU % CALL[cuda]
    # The driver is not part of a root, so that its extension is linked and judged and not imported.
    farm.recipe(
        "tiny_cuda",
        files,
        name="tiny-cuda",
        stack=name,
        build={"cuda": True, "memory_per_job": "1GiB"},
        smoke={"imports": ["torch", "tiny_cuda", "tiny_cuda._core"]},
    )
    done = projects.run_builder(["build", "tiny_cuda", "--target", target.value], farm.environment, timeout=3000)
    assert done.code == 0, done.said
    found = record_of(farm, "tiny_cuda")
    verdicts = {verdict["gate"]: verdict for verdict in found["verdicts"]}  # type: ignore[index,attr-defined]
    assert {verdicts[gate]["status"] for gate in ("cubins", "symbols")} == {"passed"}
    assert "libcuda.so.1 (driver)" in str(verdicts["symbols"]["details"])
