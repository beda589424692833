// Sum of the clipped stored gradients of every layer, in one parallel region.
#include "kernel_list.h"

namespace privimage {
namespace ISA_NAMESPACE {

constexpr int64_t kChunk = 4096;  // 16 KiB of sums stay in the first cache while the samples stream past

// sums += c[0] * in[0] + .., in this order whatever N is.
template <int N, class T>
static void add_scaled(const T* const* in, const float* c, int64_t n, float* __restrict__ sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vf s = load<vf>(sums + i);
    for (int k = 0; k < N; ++k) s += c[k] * load_floats(in[k] + i);
    store(sums + i, s);
  }
  for (; i < n; ++i)
    for (int k = 0; k < N; ++k) sums[i] += c[k] * to_float(in[k][i]);
}

// Elements lo .. lo+n-1 of one layer, in stored order; T is float or bf16.
template <class T>
static void add_chunk(const WeightedSumParams::Item& item, const WeightedSumParams& p, int64_t lo, int64_t n) {
  alignas(64) float sums[kChunk];
  std::memset(sums, 0, static_cast<size_t>(n) * sizeof(float));
  // Four samples a pass: the sums are read and written a quarter as often, and four streams keep memory busier than one.
  int64_t b = 0;
  while (b < p.samples) {
    const T* in[4];
    float c[4];
    int taken = 0;
    for (; b < p.samples && taken < 4; ++b) {
      if (p.coef[b] == 0) continue;  // not a multiplication: a rejected sample may hold inf or NaN
      c[taken] = p.coef[b];
      in[taken++] = static_cast<const T*>(item.stored) + b * item.stored_stride + lo;
    }
    if (taken == 4) {
      add_scaled<4>(in, c, n, sums);
    } else {
      for (int k = 0; k < taken; ++k) add_scaled<1>(in + k, c + k, n, sums);
    }
  }
  if (item.offsets == 1) {
    float* __restrict__ out = item.out + lo;
    for (int64_t i = 0; i < n; ++i) out[i] += sums[i];
    return;
  }
  // Line by line of channels; a line begins or ends inside a chunk now and then.
  for (int64_t i = 0; i < n;) {
    const int64_t line = (lo + i) / item.channels, channel = (lo + i) % item.channels;
    const int64_t count = min64(n - i, item.channels - channel);
    const int64_t outer = line / item.offsets, offset = line % item.offsets;
    float* out = item.out + (outer * item.channels + channel) * item.offsets + offset;
    for (int64_t k = 0; k < count; ++k) out[k * item.offsets] += sums[i + k];
    i += count;
  }
}

static int64_t size_of(const WeightedSumParams::Item& item) { return item.outer * item.offsets * item.channels; }

void weighted_sum(const WeightedSumParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.num_items; ++i) total += div_up(size_of(p.items[i]), kChunk);
  if (total == 0) return;
  const int64_t teams = max64(1, min64(p.num_threads, total));
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(teams)) if (teams > 1)
  for (int64_t team = 0; team < teams; ++team) {
    const int64_t first = total * team / teams, last = total * (team + 1) / teams;
    int64_t at = 0;  // chunks before item i
    for (int64_t i = 0; i < p.num_items && at < last; ++i) {
      const int64_t chunks = div_up(size_of(p.items[i]), kChunk);
      for (int64_t k = max64(first, at); k < min64(last, at + chunks); ++k) {
        const int64_t lo = (k - at) * kChunk;
        const int64_t n = min64(kChunk, size_of(p.items[i]) - lo);
        p.items[i].stored_dtype == DType::bf16 ? add_chunk<bf16>(p.items[i], p, lo, n) : add_chunk<float>(p.items[i], p, lo, n);
      }
      at += chunks;
    }
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
