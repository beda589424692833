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
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define STATIC_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace privimage {
namespace DEVICE_NAMESPACE {

constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

// Enough blocks to fill any current GPU several times over; kernels stride over the rest.
static inline unsigned grid_for(int64_t work, int threads = kThreads) {
  const int64_t blocks = (work + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < 4096 ? blocks : 4096);
}

// One block for each piece of work, along x.
static inline unsigned blocks_of(const char* op, int64_t work) {
  if (work > 0x7fffffff) throw std::runtime_error(std::string(op) + ": more tiles than one launch can hold; use a smaller batch");
  return static_cast<unsigned>(work);
}

// LAUNCH(op, kernel, blocks, threads, bytes of dynamic shared memory, stream, arguments of the kernel…)
#ifdef PRIVIMAGE_EMULATE
#define LAUNCH(op, kernel, grid, threads, shared, stream, ...) \
  emulation::launch(op, grid, threads, shared, [&] { kernel(__VA_ARGS__); }), (void)(stream)
#else
static inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}
template <class Kernel>
static inline void allow_shared(const char* op, Kernel* kernel, size_t bytes) {
  if (bytes <= 48 << 10) return;
  check_launch(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}
#define LAUNCH(op, kernel, grid, threads, shared, stream, ...)                                            \
  allow_shared(op, kernel, shared),                                                                   \
      kernel<<<(grid), (threads), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
      check_launch(op, cudaGetLastError())
#endif

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
