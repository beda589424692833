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

// What a captured launch cannot hold. After one use the device memory is all NaN (spend_kernel), and so is what a step then makes.
static __device__ __forceinline__ void take_armed(PrivateStepParams& p, StepConstants& c) {
  const ArmedStep& armed = *static_cast<const ArmedStep*>(p.armed);
#pragma unroll
  for (int i = 0; i < 8; ++i) p.noise.key[i] = armed.key[i];
  p.noise.stream = armed.stream;
  p.noise.rank = armed.rank;
  p.noise.step = armed.step;
  c = armed.constants;
}

// The value travels with the launch, so nothing on the host has to outlive it.
__global__ void arm_kernel(ArmedStep* to, ArmedStep value) { *to = value; }

// A launch of its own: blocks of a step run at different times, and each must find what the host armed.
__global__ void spend_kernel(uint32_t* words) {
  for (unsigned i = threadIdx.x; i < sizeof(ArmedStep) / sizeof *words; i += blockDim.x) words[i] = 0xffffffffu;
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours, bool kArmed>
__global__ void __launch_bounds__(kThreads) private_step_kernel(PrivateStepParams p, StepConstants c) {
  if (kArmed) take_armed(p, c);
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

void spend(const char* op, const PrivateStepParams& p, void* stream) {
  LAUNCH(op, spend_kernel, 1, 32, 0, stream, static_cast<uint32_t*>(p.armed));
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours>
void launch_step(const char* op, const PrivateStepParams& p, void* stream) {
  const unsigned grid = grid_for(p.size / kNormalsPerBlock + 2);  // an offset can add a block at either end
  if (p.armed) {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, kFours, true>), grid, kThreads, 0, stream, p, StepConstants{});
    spend(op, p, stream);
  } else {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, kFours, false>), grid, kThreads, 0, stream, p, step_constants(p));
  }
}

template <Optimizer kOptimizer, bool kMomentum>
void run(const char* op, const PrivateStepParams& p, void* stream) {
  bool fours = p.noise.offset % kNormalsPerBlock == 0;
  for (const float* t : {p.param, p.grad_sum, p.exp_avg, p.exp_avg_sq, p.ema, p.grad_out})
    fours = fours && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  if (fours) return launch_step<kOptimizer, kMomentum, true>(op, p, stream);
  launch_step<kOptimizer, kMomentum, false>(op, p, stream);
}

}  // namespace

void arm_step(const PrivateStepParams& p, void* stream) {
  ArmedStep value{};
  for (int i = 0; i < 8; ++i) value.key[i] = p.noise.key[i];
  value.stream = p.noise.stream;
  value.rank = p.noise.rank;
  value.step = p.noise.step;
  value.constants = step_constants(p);
  LAUNCH(__func__, arm_kernel, 1, 1, 0, stream, static_cast<ArmedStep*>(p.armed), value);
}

void spend_step(const PrivateStepParams& p, void* stream) { spend(__func__, p, stream); }

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
