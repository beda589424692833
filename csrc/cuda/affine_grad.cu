// Bias, group norm and layer norm: per-channel sums of g and of g * (x - mean) * rstd, one read of each input.
//
// Threads add up to 32 floats, then go on in double: a channel may have thousands of positions.
#include "load.cuh"
#include "reduce.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kWays = 8;  // × 32 threads

struct Sum {
  double total = 0;
  float recent = 0;
  int count = 0;

  __device__ __forceinline__ void add(float v) {
    recent += v;
    if (++count == 32) flush();
  }
  __device__ __forceinline__ void flush() {
    total += recent;
    recent = 0;
    count = 0;
  }
};

// Channels first: a warp a channel, lanes over positions. Channels last: a lane a channel, warps over positions.
template <bool kLast>
__global__ void __launch_bounds__(32 * kWays) affine_kernel(AffineGradParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  constexpr int kChannels = kLast ? 32 : kWays;
  const unsigned chunks = (static_cast<unsigned>(p.channels) + kChannels - 1) / kChannels;
  const int64_t sample = blockIdx.x / chunks, channel = blockIdx.x % chunks * kChannels + (kLast ? lane : warp);
  const bool per_group = p.stats == AffineGradParams::Stats::per_group;
  const int64_t group = static_cast<unsigned>(channel) / static_cast<unsigned>(p.channels / p.groups);
  Sum weight, bias;
  if (channel < p.channels) {
    for (int64_t row = sample * p.multiplicity; row < (sample + 1) * p.multiplicity; ++row) {
      const int64_t image = row * p.channels * p.positions;
      for (int64_t s = kLast ? warp : lane; s < p.positions; s += kLast ? kWays : 32) {
        const int64_t i = image + (kLast ? s * p.channels + channel : channel * p.positions + s);
        const float g = load_float(p.g, p.g_dtype, i);
        bias.add(g);
        if (p.mean) {
          const int64_t at = per_group ? row * p.groups + group : row * p.positions + s;
          weight.add(g * ((load_float(p.x, p.x_dtype, i) - p.mean[at]) * p.rstd[at]));
        }
      }
    }
  }
  weight.flush();
  bias.flush();
  if (kLast) {
    STATIC_SHARED(double, sums, 2 * kWays * 32);
    sums[warp * 32 + lane] = weight.total;
    sums[(kWays + warp) * 32 + lane] = bias.total;
    __syncthreads();
    if (warp > 0) return;
    for (int w = 1; w < kWays; ++w) {
      weight.total += sums[w * 32 + lane];
      bias.total += sums[(kWays + w) * 32 + lane];
    }
  } else {
    for (int bits = 16; bits > 0; bits /= 2) {
      weight.total += __shfl_xor_sync(kFullWarp, weight.total, bits);
      bias.total += __shfl_xor_sync(kFullWarp, bias.total, bits);
    }
    if (lane > 0) return;
  }
  if (channel >= p.channels) return;
  const int64_t i = sample * p.channels + channel;
  if (p.mean) p.weight[i] = static_cast<float>(p.accumulate_weight ? p.weight[i] + weight.total : weight.total);
  p.bias[i] = static_cast<float>(p.accumulate_bias ? p.bias[i] + bias.total : bias.total);
}

}  // namespace

void affine_grad(const AffineGradParams& p, void* stream) {
  const char* op = __func__;
  const bool last = p.layout == AffineGradParams::Layout::channels_last;
  const int64_t per_block = last ? 32 : kWays;
  const unsigned grid = blocks_of(op, p.samples * ((p.channels + per_block - 1) / per_block));
  if (last) {
    LAUNCH(op, affine_kernel<true>, grid, 32 * kWays, 0, stream, p);
  } else {
    LAUNCH(op, affine_kernel<false>, grid, 32 * kWays, 0, stream, p);
  }
  const unsigned rows = blocks_of(op, p.samples);
  if (p.mean) LAUNCH(op, row_norms_kernel<kThreads>, rows, kThreads, 0, stream, p.weight, p.channels, p.sq_norms_weight);
  LAUNCH(op, row_norms_kernel<kThreads>, rows, kThreads, 0, stream, p.bias, p.channels, p.sq_norms_bias);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
