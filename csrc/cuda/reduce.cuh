// Sums in double and in a fixed order: the same bits in every run.
#pragma once

#include <vector>

#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

// Over the kBlock threads of the block, all of which call it, once a kernel; the sum is thread 0's.
template <int kBlock>
static __device__ __forceinline__ double block_sum(double v) {
  STATIC_SHARED(double, per_warp, kBlock / 32);
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(kFullWarp, v, bits);
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kBlock / 32; ++w) sum += per_warp[w];
  return sum;
}

// By one warp: sq_norms[b] = sum of the sample's `tiles` partial sums.
template <bool kNotNegative>
static __device__ __forceinline__ void sum_partials_of(const double* partials, int64_t tiles, double* sq_norms, int64_t b) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += 32) sum += partials[b * tiles + i];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bits);
  if (kNotNegative && sum < 0) sum = 0;  // rounding; NaN stays
  if (threadIdx.x == 0) sq_norms[b] = sum;
}

// One warp a sample.
template <bool kNotNegative>
__global__ void sum_partials_kernel(const double* partials, int64_t tiles, double* sq_norms) {
  sum_partials_of<kNotNegative>(partials, tiles, sq_norms, blockIdx.x);
}

struct PartialNorms {
  const double* partials;
  double* sq_norms;
  int64_t tiles;
  int samples;
};

constexpr int kNorms = 64;  // kernel arguments are limited to 4 KB

struct NormBatch {
  PartialNorms items[kNorms];
  unsigned first_block[kNorms + 1];
};

template <bool kNotNegative>
__global__ void sum_many_partials_kernel(const __grid_constant__ NormBatch batch) {
  int which = 0;
  while (blockIdx.x >= batch.first_block[which + 1]) ++which;
  const PartialNorms& item = batch.items[which];
  sum_partials_of<kNotNegative>(item.partials, item.tiles, item.sq_norms, blockIdx.x - batch.first_block[which]);
}

static_assert(sizeof(NormBatch) <= 4096);

template <bool kNotNegative>
void sum_partials(const char* op, const std::vector<PartialNorms>& norms, void* stream) {
  for (size_t next = 0; next < norms.size();) {
    NormBatch batch{};
    int count = 0;
    for (; next < norms.size() && count < kNorms; ++next, ++count) {
      batch.items[count] = norms[next];
      batch.first_block[count + 1] = blocks_of(op, int64_t{batch.first_block[count]} + norms[next].samples);
    }
    LAUNCH(op, sum_many_partials_kernel<kNotNegative>, batch.first_block[count], 32, 0, stream, batch);
  }
}

// One block a row: the squared norm of (rows, n) floats, contiguous.
template <int kBlock>
__global__ void row_norms_kernel(const float* values, int64_t n, double* sq_norms) {
  const float* row = values + blockIdx.x * n;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kBlock) sum += static_cast<double>(row[i]) * row[i];
  sum = block_sum<kBlock>(sum);
  if (threadIdx.x == 0) sq_norms[blockIdx.x] = sum;
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
