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

// The elements of one batch of normals that lie in lo .. hi-1.
template <Optimizer kOptimizer, bool kMomentum>
static void step_batch(const PrivateStepParams& p, const StepConstants& c, int64_t batch, int64_t lo, int64_t hi) {
  alignas(64) double normals[kNoiseBatch];
  const int64_t at = batch * kNoiseBatch - p.noise.offset;
  if (c.noise_std != 0) {
    noise_batch(p.noise, batch * kNoiseBlocks, normals);
  } else {
    std::memset(normals, 0, sizeof normals);
  }
  lo = max64(lo, at);
  update_range<kOptimizer, kMomentum>(p, c, normals + (lo - at), lo, min64(hi, at + kNoiseBatch));
}

template <Optimizer kOptimizer, bool kMomentum>
static void run(const PrivateStepParams& p) {
  const StepConstants c = step_constants(p);
  const int64_t first = p.noise.offset / kNoiseBatch, last = div_up(p.noise.offset + p.size, kNoiseBatch);
#pragma omp parallel for schedule(static) num_threads(p.num_threads) if (last - first > 4)
  for (int64_t batch = first; batch < last; ++batch) step_batch<kOptimizer, kMomentum>(p, c, batch, 0, p.size);
}

// --- With the last micro-batch's sum --------------------------------------------------------------------------------

constexpr int64_t kRun = 32 * kNoiseBatch;  // elements that are summed, then stepped while they are in the cache

// One thread's walk through what is stored, a little ahead of its steps.
struct Sums {
  const WeightedSumParams& p;
  const float* grad_sum;
  int64_t next = 0, done = 0;  // of item `next`, the first `done` elements in stored order are summed

  int64_t start(int64_t i) const { return p.items[i].out - grad_sum; }
  int64_t size(int64_t i) const { return p.items[i].outer * p.items[i].offsets * p.items[i].channels; }

  // The last place up to `at` where stored and flat order have the same elements before them; the walk begins there.
  int64_t skip_to(int64_t at) {
    while (next < p.num_items && start(next) + size(next) <= at) ++next;
    done = 0;
    if (next == p.num_items || start(next) >= at) return at;
    const WeightedSumParams::Item& item = p.items[next];
    const int64_t plane = item.offsets == 1 ? 1 : item.offsets * item.channels;
    done = (at - start(next)) / plane * plane;
    return start(next) + done;
  }

  // Sums all that elements before `hi` need.
  void sum_before(int64_t hi) {
    for (; next < p.num_items && start(next) < hi; ++next, done = 0) {
      const WeightedSumParams::Item& item = p.items[next];
      const int64_t plane = item.offsets == 1 ? 1 : item.offsets * item.channels;
      const int64_t end = min64(size(next), div_up(hi - start(next), plane) * plane);
      if (end > done) add_stored(item, p, done, end - done);
      done = end;
      if (done < size(next)) return;
    }
  }
};

template <Optimizer kOptimizer, bool kMomentum>
static void run(const SummedStepParams& both) {
  const PrivateStepParams& p = both.step;
  const StepConstants c = step_constants(p);
  const int64_t teams = max64(1, min64(p.num_threads, p.size / kRun));
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(teams)) if (teams > 1)
  for (int64_t team = 0; team < teams; ++team) {
    Sums sums{both.sum, p.grad_sum}, until = sums;
    const int64_t end = team + 1 == teams ? p.size : until.skip_to(p.size * (team + 1) / teams);
    int64_t lo = sums.skip_to(p.size * team / teams);
    while (lo < end) {
      const int64_t run = (lo + p.noise.offset) / kRun + 1, hi = min64(end, run * kRun - p.noise.offset);
      sums.sum_before(hi);
      const int64_t first = (lo + p.noise.offset) / kNoiseBatch, last = div_up(hi + p.noise.offset, kNoiseBatch);
      for (int64_t batch = first; batch < last; ++batch) step_batch<kOptimizer, kMomentum>(p, c, batch, lo, hi);
      lo = hi;
    }
  }
}

template <class Params>
static void run(const PrivateStepParams& step, const Params& p) {
  if (step.optimizer == Optimizer::adam) return run<Optimizer::adam, false>(p);
  if (step.optimizer == Optimizer::adamw) return run<Optimizer::adamw, false>(p);
  return step.exp_avg ? run<Optimizer::sgd, true>(p) : run<Optimizer::sgd, false>(p);
}

void private_step(const PrivateStepParams& p) { run(p, p); }
void summed_step(const SummedStepParams& p) { run(p.step, p); }

}  // namespace ISA_NAMESPACE
}  // namespace privimage
