// bench/device_store_gpu.sh compiles and runs this program. It has kernels and variables with internal linkage, bool and char
// parameters, assert, and with -rdc=true a function of another unit. It compares each result with the result of the host.
#include <cassert>
#include <climits>
#include <cstdio>
#include <cstring>
#include <vector>

#ifdef OTHER_HOST_CODE
struct Unused { int number; };
static inline int unused(const Unused *value) { return value->number; }
#endif

#ifdef __CUDACC_RDC__
__device__ int linked(int value, bool flag, signed char small);
#else
__device__ static int linked(int value, bool flag, signed char small) { return flag ? value * 3 + small : value - small; }
#endif

namespace {
__device__ int counter = 40;
__constant__ int table[4] = {1, 2, 3, 4};
__device__ bool flags[2] = {false, true};
__global__ void anonymous(int *out, bool flag, signed char small, unsigned char large) {
    out[threadIdx.x] = (flag ? 1000 : 2000) + small + large + table[threadIdx.x & 3] + counter;
    if (threadIdx.x == 0) atomicAdd(&counter, flags[1] ? 2 : 0);
}
}
static __global__ void local(int *out, bool first, bool second) {
    out[threadIdx.x] = first && !second ? linked(threadIdx.x, first, -5) : -1;
}
template <typename T, bool B> __global__ void generic(T *out, T value) {
    out[threadIdx.x] = B ? value + threadIdx.x : value * threadIdx.x;
}
static __global__ void asserts(int *out) { assert(out == nullptr); }

void plain_char(int *out, int count, char value);  // the other unit defines it

static int failures = 0;

static void check(const char *what, const int *out, const std::vector<int> &wanted) {
    cudaError_t error = cudaDeviceSynchronize();
    std::vector<int> got(wanted.size());
    if (error == cudaSuccess) error = cudaMemcpy(got.data(), out, got.size() * sizeof(int), cudaMemcpyDeviceToHost);
    const bool right = error == cudaSuccess && got == wanted;
    if (!right) printf("%s: %s: %s, got %d, wanted %d\n", MODE, what, cudaGetErrorString(error), got[0], wanted[0]);
    failures += !right;
}

int main(int count, char **arguments) {
    const int n = 32;
    int *out = nullptr;
    if (cudaMalloc(&out, n * sizeof(int)) != cudaSuccess) {
        printf("no GPU\n");
        return 1;
    }
    if (count > 1 && strcmp(arguments[1], "assert") == 0) {
        asserts<<<1, 1>>>(out);
        const cudaError_t error = cudaDeviceSynchronize();
        printf("%s: assert: %s\n", MODE, cudaGetErrorString(error));
        return error != cudaErrorAssert;
    }
    std::vector<int> wanted(n);
    for (int round = 0; round < 2; round++) {
        const bool flag = round == 0;
        for (int i = 0; i < n; i++) wanted[i] = (flag ? 1000 : 2000) - 100 + 200 + (i & 3) + 1 + 40 + 2 * round;
        anonymous<<<1, n>>>(out, flag, -100, 200);
        check("a kernel and variables in an anonymous namespace", out, wanted);
    }
    for (int i = 0; i < n; i++) wanted[i] = i * 3 - 5;
    local<<<1, n>>>(out, true, false);
    check("a static kernel with bool parameters", out, wanted);
    for (int i = 0; i < n; i++) wanted[i] = 7 + i;
    generic<int, true><<<1, n>>>(out, 7);
    check("a template for true", out, wanted);
    for (int i = 0; i < n; i++) wanted[i] = 7 * i;
    generic<int, false><<<1, n>>>(out, 7);
    check("a template for false", out, wanted);
    for (int i = 0; i < n; i++) wanted[i] = static_cast<char>(0xf0);  // -16 on x86_64, 240 on aarch64
    plain_char(out, n, static_cast<char>(0xf0));
    check("a parameter of type char", out, wanted);
    int managed = 0;
    cudaMemcpyFromSymbol(&managed, counter, sizeof managed);
    failures += managed != 44;
    printf("%s: %s (counter %d)\n", MODE, failures ? "WRONG" : "right", managed);
    cudaFree(out);
    return failures != 0;
}
