#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "host_only.h"

int launch_a();
int launch_b();
int launch_c();

static PyObject *answer(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyLong_FromLong(HOST_ANSWER);
}

static PyObject *launch(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyLong_FromLong(launch_a() + launch_b() + launch_c());
}

static PyMethodDef methods[] = {
    {"answer", answer, METH_NOARGS, "What a header says."},
    {"launch", launch, METH_NOARGS, "What all units say of that header."},
    {nullptr, nullptr, 0, nullptr},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&module); }
