#pragma once
#ifdef __CUDA_ARCH__
#include "device_only.h"
#else
#include "host_only.h"
#endif
