// Sum of the clipped stored gradients: one read of what was stored, coalesced across parameters. All layers go in one
// launch (up to kItems of them).
#include "load.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kItems = 64;  // kernel arguments are limited to 4 KB

struct Batch {
  WeightedSumParams::Item items[kItems];
  unsigned first_block[kItems + 1];
  bool fours[kItems];  // every run of four stored elements is one aligned load
  int count;
};

static __device__ __forceinline__ float4 load_four(const float* p) { return *reinterpret_cast<const float4*>(p); }
static __device__ __forceinline__ float4 load_four(const uint16_t* p) {
  const uint64_t four = *reinterpret_cast<const uint64_t*>(p);
  const uint32_t low = static_cast<uint32_t>(four), high = static_cast<uint32_t>(four >> 32);
  return {__uint_as_float(low << 16), __uint_as_float(low & 0xffff0000u), __uint_as_float(high << 16),
          __uint_as_float(high & 0xffff0000u)};
}

// T: float, or uint16_t for bfloat16.
static_assert(sizeof(Batch) + 16 <= 4096, "kernel arguments are limited to 4 KB");

template <int kWidth, class T>
static __device__ __forceinline__ void add_up(const WeightedSumParams::Item& item, const float* coef, int64_t samples, int64_t i) {
  float sum[kWidth] = {};
#pragma unroll 4
  for (int64_t b = 0; b < samples; ++b) {
    const float c = coef[b];
    if (c == 0) continue;  // a rejected sample is never multiplied
    const T* stored = static_cast<const T*>(item.stored) + b * item.stored_stride + i;
    if (kWidth == 4) {
      const float4 v = load_four(stored);
      sum[0] += c * v.x;
      sum[1 % kWidth] += c * v.y;
      sum[2 % kWidth] += c * v.z;
      sum[3 % kWidth] += c * v.w;
    } else {
      sum[0] += c * load_float(stored, 0);
    }
  }
  const int64_t plane = item.offsets * item.channels;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    const int64_t within = (i + e) % plane;
    item.out[i + e - within + within % item.channels * item.offsets + within / item.channels] += sum[e];
  }
}

template <class T>
static __device__ __forceinline__ void add_up(const WeightedSumParams::Item& item, bool fours, const float* coef, int64_t samples,
                                              int64_t thread) {
  const int64_t size = item.outer * item.offsets * item.channels;
  if (fours) {
    if (4 * thread < size) add_up<4, T>(item, coef, samples, 4 * thread);
  } else {
    if (thread < size) add_up<1, T>(item, coef, samples, thread);
  }
}

__global__ void __launch_bounds__(kThreads) weighted_sum_kernel(Batch batch, const float* coef, int64_t samples) {
  int which = 0;
  while (blockIdx.x >= batch.first_block[which + 1]) ++which;
  const WeightedSumParams::Item& item = batch.items[which];
  const int64_t thread = static_cast<int64_t>(blockIdx.x - batch.first_block[which]) * kThreads + threadIdx.x;
  if (item.stored_dtype == DType::bf16) {
    add_up<uint16_t>(item, batch.fours[which], coef, samples, thread);
  } else {
    add_up<float>(item, batch.fours[which], coef, samples, thread);
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
      const uintptr_t four = item.stored_dtype == DType::bf16 ? 8 : 16;  // bytes
      const bool fours = size % 4 == 0 && item.stored_stride % 4 == 0 && reinterpret_cast<uintptr_t>(item.stored) % four == 0;
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
