// What a .cu file needs to be compiled by nvcc, or by a C++ compiler for the host emulation.
//
// The emulation defines PRIVIMAGE_EMULATE and includes the .cu file; the launchers then land in privimage::emulated.
#pragma once

#include <stdexcept>
#include <string>

#include "../kernels.h"

#ifdef PRIVIMAGE_EMULATE
#include "../emulation/host.h"
#define DEVICE_NAMESPACE emulated
#else
#include <cuda_runtime.h>
#define DEVICE_NAMESPACE cuda
#endif

namespace privimage {
namespace DEVICE_NAMESPACE {

constexpr int kThreads = 256;

// Enough blocks to fill any current GPU several times over; kernels stride over the rest.
static inline unsigned grid_for(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
}

#ifdef PRIVIMAGE_EMULATE
#define LAUNCH(kernel, grid, stream, ...) emulation::launch(kernel, grid, kThreads, __VA_ARGS__), (void)(stream)
#else
static inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}
#define LAUNCH(kernel, grid, stream, ...)                                            \
  kernel<<<(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
      check_launch(__func__)
#endif

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
