// Clipping factors on the device: the step never waits for a norm.
#include "../clip_factor.h"
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

__global__ void clip_factors_kernel(ClipFactorsParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < p.samples)
    p.factors[b] = clip_factor(p.sq_norms[b], p.sample_weight ? p.sample_weight[b] : 1.0, p.max_grad_norm);
}

}  // namespace

void clip_factors(const ClipFactorsParams& p, void* stream) {
  if (p.samples == 0) return;
  LAUNCH(__func__, clip_factors_kernel, blocks_of(__func__, (p.samples + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
