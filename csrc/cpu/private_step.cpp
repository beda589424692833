// Noise, division, optimizer and EMA in one pass: memory is read and written once, noise never reaches it.
#include "../optimizer_step.h"
#include "kernel_list.h"
#include "noise.h"

namespace privimage {
namespace ISA_NAMESPACE {

// Update and EMA of the element or the vector at i of the flat tensors.
template <Optimizer kOptimizer, bool kMomentum, class M>
static HOST_DEVICE void update(const PrivateStepParams& p, const StepConstants& c, typename M::F grad, int64_t i) {
  using F = typename M::F;
  constexpr bool kFirst = kMomentum || kOptimizer != Optimizer::sgd, kSecond = kOptimizer != Optimizer::sgd;
  F first = F{}, second = F{};
  if constexpr (kFirst) first = load<F>(p.exp_avg + i);
  if constexpr (kSecond) second = load<F>(p.exp_avg_sq + i);
  const F param = update_element<kOptimizer, kMomentum, M>(c, load<F>(p.param + i), grad, first, second);
  store(p.param + i, param);
  if constexpr (kFirst) store(p.exp_avg + i, first);
  if constexpr (kSecond) store(p.exp_avg_sq + i, second);
  if (p.ema) {
    const F ema = load<F>(p.ema + i);
    store(p.ema + i, ema + c.one_minus_ema * (param - ema));
  }
}

// Elements lo..hi of the flat tensors; normals[0] belongs to element lo. The structs come by value: vector stores may
// alias anything, and pointers would be read again after each.
template <Optimizer kOptimizer, bool kMomentum>
static HOST_DEVICE void update_range(const PrivateStepParams p, const StepConstants c, const double* normals, int64_t lo,
                                     int64_t hi) {
  float grad[kNoiseBatch];
  const int64_t n = hi - lo;
  int64_t i = 0;
  for (; i + kDoubleLanes <= n; i += kDoubleLanes) {
    const vd sum = to_double(load<vf_half>(p.grad_sum + lo + i));
    store(grad + i, __builtin_convertvector((sum + c.noise_std * load<vd>(normals + i)) * c.inv_denominator, vf_half));
    store(p.grad_sum + lo + i, vf_half{});
  }
  for (; i < n; ++i) {
    grad[i] = noisy_gradient(c, p.grad_sum[lo + i], normals[i]);
    p.grad_sum[lo + i] = 0;
  }
  if (p.grad_out) std::memcpy(p.grad_out + lo, grad, static_cast<size_t>(n) * sizeof(float));
  for (i = 0; i + kLanes <= n; i += kLanes) update<kOptimizer, kMomentum, VectorMath>(p, c, load<vf>(grad + i), lo + i);
  for (; i < n; ++i) update<kOptimizer, kMomentum, ScalarMath>(p, c, grad[i], lo + i);
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
      noise_batch(p.noise, batch * kNoiseBlocks, normals);
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
