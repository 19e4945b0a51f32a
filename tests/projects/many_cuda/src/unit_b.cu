#include "shared.h"

__global__ void scale_b(float *values, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef __CUDA_ARCH__
    if (i < count) values[i] *= FACTOR;
#endif
}

int launch_b() {
    scale_b<<<1, 1>>>(nullptr, 0);
#ifdef __CUDA_ARCH__
    return 0;
#else
    return HOST_ANSWER;
#endif
}
