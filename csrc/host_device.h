// HOST_DEVICE marks code that CPU kernels, CUDA kernels and the host emulation share. Shared functions are `static`:
// each CPU file is compiled once per instruction set, and a merged copy could carry AVX-512 code into the baseline.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
