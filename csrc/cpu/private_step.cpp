// Noise, division, optimizer and EMA in one pass: memory is read and written once, noise never reaches it.
#include "../optimizer_step.h"
#include "kernel_list.h"
#include "noise.h"

namespace privimage {
namespace ISA_NAMESPACE {

// Elements lo..hi of the flat tensors; normals[0] belongs to element lo. Simple loops over one small range, so that
// the compiler vectorises each and the data stays in the first cache.
template <Optimizer kOptimizer, bool kMomentum>
static void update_range(const PrivateStepParams& p, const StepConstants& c, const double* normals, int64_t lo,
                         int64_t hi) {
  const int64_t n = hi - lo;
  float grad[kNoiseBatch];
  float* __restrict__ sum = p.grad_sum + lo;
  float* __restrict__ param = p.param + lo;
  for (int64_t i = 0; i < n; ++i) grad[i] = noisy_gradient(c, sum[i], normals[i]);
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
  if (p.grad_out) std::memcpy(p.grad_out + lo, grad, static_cast<size_t>(n) * sizeof(float));
  if constexpr (kOptimizer == Optimizer::sgd && !kMomentum) {
    float unused = 0;
    for (int64_t i = 0; i < n; ++i) param[i] = update_element<kOptimizer, false>(c, param[i], grad[i], unused, unused);
  } else if constexpr (kOptimizer == Optimizer::sgd) {
    float* __restrict__ buffer = p.exp_avg + lo;
    float unused = 0;
    for (int64_t i = 0; i < n; ++i) param[i] = update_element<kOptimizer, true>(c, param[i], grad[i], buffer[i], unused);
  } else {
    float* __restrict__ m = p.exp_avg + lo;
    float* __restrict__ v = p.exp_avg_sq + lo;
    for (int64_t i = 0; i < n; ++i) param[i] = update_element<kOptimizer, false>(c, param[i], grad[i], m[i], v[i]);
  }
  if (p.ema) {
    float* __restrict__ ema = p.ema + lo;
    for (int64_t i = 0; i < n; ++i) ema[i] += c.one_minus_ema * (param[i] - ema[i]);
  }
}

template <Optimizer kOptimizer, bool kMomentum>
static void run(const PrivateStepParams& p) {
  const StepConstants c = step_constants(p);
  const int64_t begin = p.noise.offset, end = begin + p.size;
  const int64_t first = begin / kNoiseBatch, last = div_up(end, kNoiseBatch);
#pragma omp parallel for schedule(static) num_threads(p.num_threads) if (last - first > 4)
  for (int64_t batch = first; batch < last; ++batch) {
    alignas(64) double normals[kNoiseBatch];
    const int64_t at = batch * kNoiseBatch;
    const int64_t lo = max64(begin, at), hi = min64(end, at + kNoiseBatch);
    if (c.noise_std != 0) {
      noise_batch(p.noise, batch * kLanes, normals);
    } else {
      std::memset(normals, 0, sizeof normals);
    }
    update_range<kOptimizer, kMomentum>(p, c, normals + (lo - at), lo - begin, hi - begin);
  }
}

void private_step(const PrivateStepParams& p) {
  if (p.optimizer == Optimizer::adam) return run<Optimizer::adam, false>(p);
  if (p.optimizer == Optimizer::adamw) return run<Optimizer::adamw, false>(p);
  return p.exp_avg ? run<Optimizer::sgd, true>(p) : run<Optimizer::sgd, false>(p);
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
