// Runs CUDA device code on the host, so that a .cu file's logic is tested where there is no GPU.
//
// Threads run one after another, which is exact for kernels whose threads do not talk to each other. A kernel with
// __shared__ memory and __syncthreads needs the threads of a block interleaved at each barrier: run them as fibers
// inside run_block, make `shared` one buffer per block, and let __syncthreads switch fibers. Nothing else changes.
#pragma once

#define __global__ static
#define __device__

namespace privimage {
namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

}  // namespace emulation
}  // namespace privimage

static thread_local privimage::emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace privimage {
namespace emulation {

template <class Kernel, class... Args>
static void run_block(Kernel kernel, const Args&... args) {
  for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(args...);
}

template <class Kernel, class... Args>
static void launch(Kernel kernel, unsigned grid, unsigned block, const Args&... args) {
  gridDim.x = grid;
  blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) run_block(kernel, args...);
}

}  // namespace emulation
}  // namespace privimage
