// One element of the private step, shared by CPU and CUDA. Follows torch.optim's SGD, Adam and AdamW (no amsgrad, no
// nesterov, dampening 0). Compiled without contraction, so every backend gives the same bits.
#pragma once

#include <cmath>

#include "gaussian.h"
#include "kernels.h"

namespace privimage {

// What the update needs per element, computed once per call in double and rounded once.
struct StepConstants {
  double noise_std, inv_denominator;
  float lr, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, momentum, one_minus_ema;
  float step_size, inv_sqrt_bias2, shrink;
};

// What changes from step to step, as a captured launch reads it from device memory.
struct ArmedStep {
  uint32_t key[8], stream, rank, step, unused;
  StepConstants constants;
};
static_assert(sizeof(ArmedStep) % 8 == 0, "an array of words");

static inline StepConstants step_constants(const PrivateStepParams& p) {
  StepConstants c{};
  c.noise_std = p.noise_std;
  c.inv_denominator = 1.0 / p.denominator;
  c.lr = static_cast<float>(p.lr);
  c.one_minus_beta1 = static_cast<float>(1.0 - p.beta1);
  c.beta2 = static_cast<float>(p.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - p.beta2);
  c.eps = static_cast<float>(p.eps);
  c.weight_decay = static_cast<float>(p.weight_decay);
  c.momentum = static_cast<float>(p.momentum);
  c.one_minus_ema = static_cast<float>(1.0 - p.ema_decay);
  const double t = static_cast<double>(p.optimizer_step);
  c.step_size = static_cast<float>(p.lr / (1.0 - std::pow(p.beta1, t)));
  c.inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(p.beta2, t)));
  c.shrink = static_cast<float>(1.0 - p.lr * p.weight_decay);
  return c;
}

// The noisy mean gradient. The sum of signal and noise is formed in double and rounded once.
static HOST_DEVICE float noisy_gradient(const StepConstants& c, float grad_sum, double normal) {
  return static_cast<float>((static_cast<double>(grad_sum) + c.noise_std * normal) * c.inv_denominator);
}

// M::F is float, or a vector of them.
template <Optimizer kOptimizer, bool kMomentum, class M>
static HOST_DEVICE typename M::F update_element(const StepConstants& c, typename M::F param, typename M::F grad,
                                                typename M::F& exp_avg, typename M::F& exp_avg_sq) {
  if (kOptimizer == Optimizer::adamw) {
    param = param * c.shrink;
  } else {
    grad = grad + c.weight_decay * param;
  }
  if (kOptimizer == Optimizer::sgd) {
    if (kMomentum) {
      exp_avg = c.momentum * exp_avg + grad;
      grad = exp_avg;
    }
    return param - c.lr * grad;
  }
  exp_avg = exp_avg + c.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
  return param - c.step_size * (exp_avg / (M::sqrt(exp_avg_sq) * c.inv_sqrt_bias2 + c.eps));
}

}  // namespace privimage
