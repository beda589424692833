// Noise, division, optimizer and EMA in one pass. A thread owns one ChaCha20 block, so the 8 elements it serves.
#include "../chacha20.h"
#include "../gaussian.h"
#include "../optimizer_step.h"
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

template <Optimizer kOptimizer, bool kMomentum>
__global__ void private_step_kernel(PrivateStepParams p, StepConstants c) {
  const int64_t begin = p.noise.offset, end = begin + p.size;
  const int64_t last = (end + kNormalsPerBlock - 1) / kNormalsPerBlock;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const uint32_t nonce[3] = {p.noise.stream, p.noise.rank, p.noise.step};
  int64_t block = begin / kNormalsPerBlock + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; block < last; block += step) {
    double normals[kNormalsPerBlock] = {};
    if (c.noise_std != 0) {
      uint32_t words[16];
      chacha20_block<uint32_t>(p.noise.key, static_cast<uint32_t>(block), nonce, 0u, words);
      for (int i = 0; i < 4; ++i)
        box_muller<ScalarMath>(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3], normals[2 * i],
                               normals[2 * i + 1]);
    }
    for (int j = 0; j < kNormalsPerBlock; ++j) {
      const int64_t i = block * kNormalsPerBlock + j - begin;
      if (i < 0 || i >= p.size) continue;
      const float grad = noisy_gradient(c, p.grad_sum[i], normals[j]);
      p.grad_sum[i] = 0;
      if (p.grad_out) p.grad_out[i] = grad;
      float first = p.exp_avg ? p.exp_avg[i] : 0, second = p.exp_avg_sq ? p.exp_avg_sq[i] : 0;
      const float param = update_element<kOptimizer, kMomentum, ScalarMath>(c, p.param[i], grad, first, second);
      p.param[i] = param;
      if (p.exp_avg) p.exp_avg[i] = first;
      if (p.exp_avg_sq) p.exp_avg_sq[i] = second;
      if (p.ema) p.ema[i] += c.one_minus_ema * (param - p.ema[i]);
    }
  }
}

void private_step(const PrivateStepParams& p, void* stream) {
  if (p.size == 0) return;
  const StepConstants c = step_constants(p);
  const unsigned grid = grid_for(p.size / kNormalsPerBlock + 2);  // an offset can add a block at either end
  if (p.optimizer == Optimizer::adam) {
    LAUNCH(__func__, (private_step_kernel<Optimizer::adam, false>), grid, kThreads, 0, stream, p, c);
  } else if (p.optimizer == Optimizer::adamw) {
    LAUNCH(__func__, (private_step_kernel<Optimizer::adamw, false>), grid, kThreads, 0, stream, p, c);
  } else if (p.exp_avg) {
    LAUNCH(__func__, (private_step_kernel<Optimizer::sgd, true>), grid, kThreads, 0, stream, p, c);
  } else {
    LAUNCH(__func__, (private_step_kernel<Optimizer::sgd, false>), grid, kThreads, 0, stream, p, c);
  }
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
