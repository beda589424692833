// Sum of the clipped stored gradients: one read of what was stored, coalesced across parameters. All layers go in one
// launch (up to kItems of them).
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kItems = 64;  // kernel arguments are limited to 4 KB

struct Batch {
  WeightedSumParams::Item items[kItems];
  unsigned first_block[kItems + 1];
  bool fours[kItems];  // every run of four elements is one aligned load
  int count;
};

template <int kWidth>
static __device__ __forceinline__ void add_up(const WeightedSumParams::Item& item, const float* coef, int64_t samples, int64_t i) {
  float sum[kWidth] = {};
#pragma unroll 4
  for (int64_t b = 0; b < samples; ++b) {
    const float c = coef[b];
    if (c == 0) continue;  // a rejected sample is never multiplied
    const float* stored = item.stored + b * item.stored_stride + i;
    if (kWidth == 4) {
      const float4 v = *reinterpret_cast<const float4*>(stored);
      sum[0] += c * v.x;
      sum[1 % kWidth] += c * v.y;
      sum[2 % kWidth] += c * v.z;
      sum[3 % kWidth] += c * v.w;
    } else {
      sum[0] += c * stored[0];
    }
  }
  const int64_t plane = item.offsets * item.channels;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    const int64_t within = (i + e) % plane;
    item.out[i + e - within + within % item.channels * item.offsets + within / item.channels] += sum[e];
  }
}

__global__ void __launch_bounds__(kThreads) weighted_sum_kernel(Batch batch, const float* coef, int64_t samples) {
  int which = 0;
  while (blockIdx.x >= batch.first_block[which + 1]) ++which;
  const WeightedSumParams::Item& item = batch.items[which];
  const int64_t size = item.outer * item.offsets * item.channels;
  const int64_t thread = static_cast<int64_t>(blockIdx.x - batch.first_block[which]) * kThreads + threadIdx.x;
  if (batch.fours[which]) {
    if (4 * thread < size) add_up<4>(item, coef, samples, 4 * thread);
  } else {
    if (thread < size) add_up<1>(item, coef, samples, thread);
  }
}

}  // namespace

void weighted_sum(const WeightedSumParams& p, void* stream) {
  int64_t next = 0;
  while (next < p.num_items) {
    Batch batch{};
    for (; next < p.num_items && batch.count < kItems; ++next) {
      const WeightedSumParams::Item& item = p.items[next];
      const int64_t size = item.outer * item.offsets * item.channels;
      if (size == 0) continue;
      const bool fours = size % 4 == 0 && item.stored_stride % 4 == 0 && reinterpret_cast<uintptr_t>(item.stored) % 16 == 0;
      const int64_t blocks = ((fours ? size / 4 : size) + kThreads - 1) / kThreads;
      batch.items[batch.count] = item;
      batch.fours[batch.count] = fours;
      batch.first_block[batch.count + 1] = blocks_of(__func__, batch.first_block[batch.count] + blocks);
      ++batch.count;
    }
    if (batch.count == 0) return;
    LAUNCH(__func__, weighted_sum_kernel, batch.first_block[batch.count], kThreads, 0, stream, batch, p.coef, p.samples);
  }
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
