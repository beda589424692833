// Group normalisation of images with channels innermost, followed by SiLU or by nothing, and its backward pass. A block takes
// an image: the first read makes the sums, the second, which finds the image in the cache, makes the result. The backward
// pass leaves each image's gradients of weight and bias, which per-sample clipping needs, as a part of its first read.
//
// Statistics are taken about the image's first position, so that a mean far from zero costs no digits; a thread adds floats, a
// few dozen of them, and goes on in double.
#include "images.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

// 1 / (1 + e^-z), to 2e-7: 0 and not NaN where e^-z is infinite. The accurate functions took longer than memory does.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <class T, bool kSilu>
__global__ void __launch_bounds__(kImageThreads, 1) forward_kernel(GroupNormParams p) {
  DYNAMIC_SHARED(memory);
  const Place place(p.channels);
  const ChannelSums sums(memory, p.channels, place);
  const int64_t row = blockIdx.x, image = row * p.positions * p.channels, width = p.channels / p.groups;
  const T* x = static_cast<const T*>(p.x) + image;
  const float* const added = p.shift ? p.shift + row * p.channels : nullptr;
  float about[kVector], first[kVector], second[kVector];
  for (int i = 0; i < kVector; ++i) {
    about[i] = place.works ? load_float(x, place.channel(i)) : 0;
    first[i] = second[i] = 0;
  }
  if (place.works) {
    each_position<false>(p.positions, p.channels, place, x, x, [&](const Chunk<T>& v, const Chunk<T>&, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float d = value_of(v, i) - about[i];
        first[i] += d;
        second[i] = fmaf(d, d, second[i]);
      }
    });
  }
  add_up(sums, place, p.channels, first, second);
  for (int64_t group = threadIdx.x; group < p.groups; group += kImageThreads) {
    const double positions = static_cast<double>(p.positions);
    double mean = 0, squares = 0;
    const auto level = [&](int64_t c) { return load_float(x, c) + (added ? added[c] : 0.0) + sums.whole[c] / positions; };
    for (int64_t c = group * width; c < (group + 1) * width; ++c) mean += level(c);
    mean /= static_cast<double>(width);
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const double off = level(c) - mean;
      const double within = sums.whole[p.channels + c] - sums.whole[c] * sums.whole[c] / positions;
      squares += (within > 0 ? within : within <= 0 ? 0 : within) + positions * off * off;  // rounding is dropped, NaN kept
    }
    const double rstd = 1 / sqrt(squares / (positions * static_cast<double>(width)) + p.eps);
    sums.after[group] = p.mean[row * p.groups + group] = static_cast<float>(mean);
    sums.after[p.groups + group] = p.rstd[row * p.groups + group] = static_cast<float>(rstd);
  }
  __syncthreads();
  if (!place.works) return;
  float mean[kVector], scale[kVector], shift[kVector];
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = place.channel(i), group = c / width;
    mean[i] = sums.after[group] - (added ? added[c] : 0.0f);
    scale[i] = sums.after[p.groups + group] * (p.weight ? p.weight[c] : 1.0f);
    shift[i] = p.bias ? p.bias[c] : 0.0f;
  }
  T* y = static_cast<T*>(p.y) + image;
  each_position<false>(p.positions, p.channels, place, x, x, [&](const Chunk<T>& v, const Chunk<T>&, int64_t s) {
    Chunk<T> out;
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      float z[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        z[k] = fmaf(value_of(v, i + k) - mean[i + k], scale[i + k], shift[i + k]);
        if (kSilu) z[k] *= sigmoid(z[k]);
      }
      set_pair(out, i, z[0], z[1]);
    }
    store(y, s, p.channels, place, out);
  });
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kImageThreads, 1) backward_kernel(GroupNormParams p) {
  DYNAMIC_SHARED(memory);
  const Place place(p.channels);
  const ChannelSums sums(memory, p.channels, place);
  const int64_t row = blockIdx.x, image = row * p.positions * p.channels, width = p.channels / p.groups;
  const T* x = static_cast<const T*>(p.x) + image;
  const T* g = static_cast<const T*>(p.g) + image;
  float mean[kVector], rstd[kVector], weight[kVector], bias[kVector], of_weight[kVector], of_bias[kVector];
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = place.works ? place.channel(i) : 0, group = row * p.groups + c / width;
    mean[i] = p.mean[group] - (p.shift ? p.shift[row * p.channels + c] : 0.0f);
    rstd[i] = p.rstd[group];
    weight[i] = p.weight ? p.weight[c] : 1.0f;
    bias[i] = p.bias ? p.bias[c] : 0.0f;
    of_weight[i] = of_bias[i] = 0;
  }
  // The gradient of what was normalised, scaled and shifted, before SiLU.
  const auto inner = [&](float xn, float dy, int i) {
    if (!kSilu) return dy;
    const float z = fmaf(xn, weight[i], bias[i]), s = sigmoid(z);
    return dy * (s * fmaf(z, 1.0f - s, 1.0f));
  };
  if (place.works) {
    each_position<true>(p.positions, p.channels, place, x, g, [&](const Chunk<T>& v, const Chunk<T>& dy, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float xn = (value_of(v, i) - mean[i]) * rstd[i], dz = inner(xn, value_of(dy, i), i);
        of_weight[i] = fmaf(dz, xn, of_weight[i]);
        of_bias[i] += dz;
      }
    });
  }
  add_up(sums, place, p.channels, of_weight, of_bias);
  for (int64_t c = threadIdx.x; c < p.channels; c += kImageThreads) {
    p.weight_rows[row * p.channels + c] = static_cast<float>(sums.whole[c]);
    p.bias_rows[row * p.channels + c] = static_cast<float>(sums.whole[p.channels + c]);
  }
  for (int64_t group = threadIdx.x; group < p.groups; group += kImageThreads) {
    double along = 0, level = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const double w = p.weight ? p.weight[c] : 1.0;
      along += w * sums.whole[c];
      level += w * sums.whole[p.channels + c];
    }
    const double count = static_cast<double>(p.positions) * static_cast<double>(width);
    sums.after[group] = static_cast<float>(along / count);
    sums.after[p.groups + group] = static_cast<float>(level / count);
  }
  __syncthreads();
  if (!p.dx) return;
  float total[kVector], none[kVector];
  for (int i = 0; i < kVector; ++i) total[i] = none[i] = 0;
  if (place.works) {
    float along[kVector], level[kVector];
    for (int i = 0; i < kVector; ++i) {
      along[i] = sums.after[place.channel(i) / width];
      level[i] = sums.after[p.groups + place.channel(i) / width];
    }
    T* dx = static_cast<T*>(p.dx) + image;
    each_position<true>(p.positions, p.channels, place, x, g, [&](const Chunk<T>& v, const Chunk<T>& dy, int64_t s) {
      Chunk<T> out;
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        float d[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int c = i + k;
          const float xn = (value_of(v, c) - mean[c]) * rstd[c], dz = inner(xn, value_of(dy, c), c);
          d[k] = rstd[c] * fmaf(-xn, along[c], fmaf(dz, weight[c], -level[c]));
          total[c] += d[k];
        }
        set_pair(out, i, d[0], d[1]);
      }
      store(dx, s, p.channels, place, out);
    });
  }
  if (!p.shift_rows) return;
  add_up(sums, place, p.channels, total, none);
  for (int64_t c = threadIdx.x; c < p.channels; c += kImageThreads)
    p.shift_rows[row * p.channels + c] = static_cast<float>(sums.whole[c]);
}

template <class T, bool kSilu>
void launch(const char* op, const GroupNormParams& p, void* stream) {
  const unsigned grid = blocks_of(op, p.rows);
  if (p.g) {
    LAUNCH(op, (backward_kernel<T, kSilu>), grid, kImageThreads, image_shared(p.channels, 2 * p.groups), stream, p);
  } else {
    LAUNCH(op, (forward_kernel<T, kSilu>), grid, kImageThreads, image_shared(p.channels, 2 * p.groups), stream, p);
  }
}

}  // namespace

void group_norm(const GroupNormParams& p, void* stream) {
  const char* op = __func__;
  check_channels(op, p.channels);
  if (p.channels % p.groups) throw std::runtime_error(std::string(op) + ": the groups do not divide the channels");
  if (p.rows == 0 || p.positions == 0) return;
  if (p.dtype == DType::bf16) {
    p.silu ? launch<uint16_t, true>(op, p, stream) : launch<uint16_t, false>(op, p, stream);
  } else {
    p.silu ? launch<float, true>(op, p, stream) : launch<float, false>(op, p, stream);
  }
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
