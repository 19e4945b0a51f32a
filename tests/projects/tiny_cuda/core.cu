#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime.h>

__global__ void scale(float *values, float factor, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] *= factor;
}

static PyObject *devices(PyObject *self, PyObject *args) {
    int count = 0;
    (void)self, (void)args;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) count = 0;
    if (count > 0) scale<<<1, 1>>>(nullptr, 1.0f, 0);
    return PyLong_FromLong(count);
}

static PyMethodDef methods[] = {{"devices", devices, METH_NOARGS, "Number of GPUs."}, {nullptr, nullptr, 0, nullptr}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&module); }
