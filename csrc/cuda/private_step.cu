// Noise, division, optimizer and EMA in one pass. A thread owns one ChaCha20 block, so the 8 elements it serves: where
// they lie in aligned memory as two runs of four (kFours), they are read and written so.
#include "../chacha20.h"
#include "../gaussian.h"
#include "../optimizer_step.h"
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

static __device__ __forceinline__ void draw(const NoiseKey& noise, int64_t block, double (&normals)[kNormalsPerBlock]) {
  const uint32_t nonce[3] = {noise.stream, noise.rank, noise.step};
  uint32_t words[16];
  chacha20_block<uint32_t>(noise.key, static_cast<uint32_t>(block), nonce, 0u, words);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    box_muller<ScalarMath>(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3], normals[2 * i],
                           normals[2 * i + 1]);
}

// kCount elements of each array, from i on; an array that is absent reads as zeroes and is not written.
template <int kCount>
struct Elements {
  float v[kCount];

  __device__ __forceinline__ Elements(const float* from, int64_t i) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = 0;
    if (!from) return;
    if (kCount == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      v[0] = four.x;
      v[1 % kCount] = four.y;
      v[2 % kCount] = four.z;
      v[3 % kCount] = four.w;
    } else {
      v[0] = from[i];
    }
  }
  __device__ __forceinline__ void store(float* to, int64_t i) const {
    if (!to) return;
    if (kCount == 4) {
      *reinterpret_cast<float4*>(to + i) = {v[0], v[1 % kCount], v[2 % kCount], v[3 % kCount]};
    } else {
      to[i] = v[0];
    }
  }
};

template <Optimizer kOptimizer, bool kMomentum, int kCount>
static __device__ __forceinline__ void update(const PrivateStepParams& p, const StepConstants& c, const double* normals, int64_t i) {
  Elements<kCount> param(p.param, i), grad(p.grad_sum, i), first(p.exp_avg, i), second(p.exp_avg_sq, i), ema(p.ema, i);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    grad.v[e] = noisy_gradient(c, grad.v[e], normals[e]);
    param.v[e] = update_element<kOptimizer, kMomentum, ScalarMath>(c, param.v[e], grad.v[e], first.v[e], second.v[e]);
    ema.v[e] += c.one_minus_ema * (param.v[e] - ema.v[e]);
  }
  Elements<kCount>(nullptr, 0).store(p.grad_sum, i);
  grad.store(p.grad_out, i);
  param.store(p.param, i);
  first.store(p.exp_avg, i);
  second.store(p.exp_avg_sq, i);
  ema.store(p.ema, i);
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours>
__global__ void __launch_bounds__(kThreads) private_step_kernel(PrivateStepParams p, StepConstants c) {
  const int64_t begin = p.noise.offset, end = begin + p.size;
  const int64_t last = (end + kNormalsPerBlock - 1) / kNormalsPerBlock;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t block = begin / kNormalsPerBlock + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; block < last; block += step) {
    double normals[kNormalsPerBlock] = {};
    if (c.noise_std != 0) draw(p.noise, block, normals);
    const int64_t first = block * kNormalsPerBlock - begin;
    if (kFours && first + kNormalsPerBlock <= p.size) {
      update<kOptimizer, kMomentum, 4>(p, c, normals, first);
      update<kOptimizer, kMomentum, 4>(p, c, normals + 4, first + 4);
    } else {
#pragma unroll
      for (int j = 0; j < kNormalsPerBlock; ++j)
        if (first + j >= 0 && first + j < p.size) update<kOptimizer, kMomentum, 1>(p, c, normals + j, first + j);
    }
  }
}

template <Optimizer kOptimizer, bool kMomentum>
void run(const char* op, const PrivateStepParams& p, void* stream) {
  const StepConstants c = step_constants(p);
  const unsigned grid = grid_for(p.size / kNormalsPerBlock + 2);  // an offset can add a block at either end
  bool fours = p.noise.offset % kNormalsPerBlock == 0;
  for (const float* t : {p.param, p.grad_sum, p.exp_avg, p.exp_avg_sq, p.ema, p.grad_out})
    fours = fours && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  if (fours) {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, true>), grid, kThreads, 0, stream, p, c);
  } else {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, false>), grid, kThreads, 0, stream, p, c);
  }
}

}  // namespace

void private_step(const PrivateStepParams& p, void* stream) {
  const char* op = __func__;
  if (p.size == 0) return;
  if (p.optimizer == Optimizer::adam) return run<Optimizer::adam, false>(op, p, stream);
  if (p.optimizer == Optimizer::adamw) return run<Optimizer::adamw, false>(op, p, stream);
  if (p.exp_avg) return run<Optimizer::sgd, true>(op, p, stream);
  run<Optimizer::sgd, false>(op, p, stream);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
