// Bias, group norm and layer norm: per-channel sums of g and of g * (x - mean) * rstd, one read of each input.
//
// The normalised input is formed element by element: sum(g*x) - mean*sum(g) would cancel where |mean| is large.
#include "kernel_list.h"

namespace privimage {
namespace ISA_NAMESPACE {

// One channel of one row, positions contiguous.
template <class TX, class TG>
static void channel_sums(const TX* x, const TG* g, int64_t n, float mean, float rstd, float& weight, float& bias) {
  vf w = vf{}, s = vf{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf gv = load_floats(g + i);
    s += gv;
    if (x) w += gv * ((load_floats(x + i) - mean) * rstd);
  }
  float wt = 0, st = 0;
  for (; i < n; ++i) {
    const float gs = to_float(g[i]);
    st += gs;
    if (x) wt += gs * ((to_float(x[i]) - mean) * rstd);
  }
  for (int l = 0; l < kLanes; ++l) {
    wt += w[l];
    st += s[l];
  }
  weight += wt;
  bias += st;
}

template <class TX, class TG>
static void sample_channels_first(const AffineGradParams& p, int64_t b, float* weight, float* bias) {
  const int64_t per_group = p.channels / p.groups, image = p.channels * p.positions;
  for (int64_t k = 0; k < p.multiplicity; ++k) {
    const int64_t row = b * p.multiplicity + k;
    const TG* g = static_cast<const TG*>(p.g) + row * image;
    const TX* x = p.mean ? static_cast<const TX*>(p.x) + row * image : nullptr;
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = c * p.positions;
      if (p.mean && p.stats == AffineGradParams::Stats::per_position) {
        for (int64_t t = 0; t < p.positions; ++t) {
          const int64_t s = row * p.positions + t;
          channel_sums(x + at + t, g + at + t, 1, p.mean[s], p.rstd[s], weight[c], bias[c]);
        }
        continue;
      }
      const int64_t s = row * p.groups + c / per_group;
      channel_sums(p.mean ? x + at : nullptr, g + at, p.positions, p.mean ? p.mean[s] : 0.0f, p.mean ? p.rstd[s] : 0.0f,
                   weight[c], bias[c]);
    }
  }
}

// One position: every channel gains its product. mean and rstd advance per channel (step 1) or stay (step 0).
template <class TX, class TG>
static void add_position(const AffineGradParams& p, const TX* x, const TG* g, const float* mean, const float* rstd,
                         bool per_channel, float* __restrict__ weight, float* __restrict__ bias) {
  int64_t c = 0;
  for (; c + kLanes <= p.channels; c += kLanes) {
    const vf gv = load_floats(g + c);
    store(bias + c, load<vf>(bias + c) + gv);
    if (!x) continue;
    const vf m = per_channel ? load<vf>(mean + c) : vf{} + *mean;
    const vf r = per_channel ? load<vf>(rstd + c) : vf{} + *rstd;
    store(weight + c, load<vf>(weight + c) + gv * ((load_floats(x + c) - m) * r));
  }
  for (; c < p.channels; ++c) {
    const float gs = to_float(g[c]);
    bias[c] += gs;
    if (x) weight[c] += gs * ((to_float(x[c]) - mean[per_channel ? c : 0]) * rstd[per_channel ? c : 0]);
  }
}

template <class TX, class TG>
static void sample_channels_last(const AffineGradParams& p, int64_t b, float* weight, float* bias, float* mean,
                                 float* rstd) {
  const int64_t per_group = p.channels / p.groups, image = p.channels * p.positions;
  const bool per_channel = p.stats == AffineGradParams::Stats::per_group;
  for (int64_t k = 0; k < p.multiplicity; ++k) {
    const int64_t row = b * p.multiplicity + k;
    if (p.mean && per_channel) {
      for (int64_t c = 0; c < p.channels; ++c) {
        mean[c] = p.mean[row * p.groups + c / per_group];
        rstd[c] = p.rstd[row * p.groups + c / per_group];
      }
    }
    for (int64_t t = 0; t < p.positions; ++t) {
      const int64_t at = row * image + t * p.channels, s = row * p.positions + t;
      const TX* x = p.mean ? static_cast<const TX*>(p.x) + at : nullptr;
      add_position(p, x, static_cast<const TG*>(p.g) + at, per_channel || !p.mean ? mean : p.mean + s,
                   per_channel || !p.mean ? rstd : p.rstd + s, per_channel, weight, bias);
    }
  }
}

static void finish(const float* sums, float* out, double* sq_norm, int64_t n, bool accumulate) {
  for (int64_t c = 0; c < n; ++c) out[c] = accumulate ? out[c] + sums[c] : sums[c];
  *sq_norm = square_sum(out, n);
}

template <class TX, class TG>
static void run(const AffineGradParams& p) {
  // Per thread: weight sums, bias sums, and mean and rstd spread over the channels.
  const int threads = p.samples > 1 ? static_cast<int>(max64(1, min64(p.num_threads, p.samples))) : 1;
  const int64_t padded = div_up(p.channels, 16) * 16;
  float* buffers = static_cast<float*>(scratch(static_cast<size_t>(threads * 4 * padded) * sizeof(float)));
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int team = 0; team < threads; ++team) {
    float* weight = buffers + team * 4 * padded;
    float* bias = weight + padded;
    for (int64_t b = p.samples * team / threads; b < p.samples * (team + 1) / threads; ++b) {
      std::memset(weight, 0, static_cast<size_t>(4 * padded) * sizeof(float));
      if (p.layout == AffineGradParams::Layout::channels_first) {
        sample_channels_first<TX, TG>(p, b, weight, bias);
      } else {
        sample_channels_last<TX, TG>(p, b, weight, bias, bias + padded, bias + 2 * padded);
      }
      if (p.mean)
        finish(weight, p.weight + b * p.channels, p.sq_norms_weight + b, p.channels, p.accumulate_weight);
      finish(bias, p.bias + b * p.channels, p.sq_norms_bias + b, p.channels, p.accumulate_bias);
    }
  }
}

void affine_grad(const AffineGradParams& p) {
  const bool x16 = p.mean && p.x_dtype == DType::bf16, g16 = p.g_dtype == DType::bf16;
  if (x16) return g16 ? run<bf16, bf16>(p) : run<bf16, float>(p);
  return g16 ? run<float, bf16>(p) : run<float, float>(p);
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
