// The other unit of bench/device_store_gpu.cu. It has a parameter of type char, and a function for -rdc=true.
#ifdef __CUDACC_RDC__
__device__ int linked(int value, bool flag, signed char small) { return flag ? value * 3 + small : value - small; }
#endif

static __global__ void kernel(int *out, char value) { out[threadIdx.x] = value; }

void plain_char(int *out, int count, char value) { kernel<<<1, count>>>(out, value); }
