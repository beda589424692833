// Sum of the clipped stored gradients: one read of what was stored, coalesced across parameters.
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

__global__ void weighted_sum_kernel(WeightedSumParams::Item item, const float* coef, int64_t samples) {
  const int64_t plane = item.offsets * item.channels, size = item.outer * plane;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    float sum = 0;
    for (int64_t b = 0; b < samples; ++b) {
      const float c = coef[b];
      if (c != 0) sum += c * item.stored[b * item.stored_stride + i];  // a rejected sample is never multiplied
    }
    const int64_t within = i % plane;
    item.out[i - within + within % item.channels * item.offsets + within / item.channels] += sum;
  }
}

void weighted_sum(const WeightedSumParams& p, void* stream) {
  for (int64_t i = 0; i < p.num_items; ++i) {
    const WeightedSumParams::Item& item = p.items[i];
    const int64_t size = item.outer * item.offsets * item.channels;
    if (size == 0) continue;
    LAUNCH(weighted_sum_kernel, grid_for(size), stream, item, p.coef, p.samples);
  }
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
