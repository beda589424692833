// Group normalisation of images with channels innermost, followed by SiLU or by nothing, and its backward pass. A block takes
// an image: the first read makes the sums, the second, which finds the image in the cache, makes the result. The backward
// pass leaves each image's gradients of weight and bias, which per-sample clipping needs, as a part of its first read.
//
// Statistics are taken about the image's first position, so that a mean far from zero costs no digits; a thread adds floats, a
// few dozen of them, and goes on in double.
#include "load.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kBlock = 512;
constexpr int kVector = 8;    // channels of a thread
constexpr int kOnTheWay = 4;  // chunks that a thread has asked for at once

// kVector neighbouring channels, as they lie in memory.
template <class T>
struct alignas(16) Chunk {
  T values[kVector];
};

template <class T>
__device__ __forceinline__ float value_of(const Chunk<T>& chunk, int i) {
  return load_float(chunk.values, i);
}
__device__ __forceinline__ void set_pair(Chunk<float>& chunk, int i, float a, float b) {
  chunk.values[i] = a;
  chunk.values[i + 1] = b;
}
__device__ __forceinline__ void set_pair(Chunk<uint16_t>& chunk, int i, float a, float b) {
  const uint32_t pair = to_bf16_pair(a, b);
  memcpy(&chunk.values[i], &pair, sizeof pair);
}

// 1 / (1 + e^-z), to 2e-7: 0 and not NaN where e^-z is infinite. The accurate functions took longer than memory does.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// What a thread has to do: the channels of one chunk at every `lanes`th position.
struct Place {
  int chunks, lanes, chunk, lane;
  bool works;

  __device__ explicit Place(const GroupNormParams& p) {
    chunks = static_cast<int>(p.channels) / kVector;
    lanes = kBlock / chunks;
    chunk = static_cast<int>(threadIdx.x) % chunks;
    lane = static_cast<int>(threadIdx.x) / chunks;
    works = lane < lanes;
  }
  __device__ int channel(int i) const { return chunk * kVector + i; }
};

// Per thread and channel two sums, then of the block.
struct Sums {
  float* parts;   // (2, lanes, channels)
  double* whole;  // (2, channels)
  float* group;   // (2, groups)

  __device__ Sums(unsigned char* memory, const GroupNormParams& p, const Place& place) {
    whole = reinterpret_cast<double*>(memory);
    parts = reinterpret_cast<float*>(whole + 2 * p.channels);
    group = parts + 2 * place.lanes * p.channels;
  }
};

size_t shared_bytes(const GroupNormParams& p) {
  const int64_t lanes = kBlock / (p.channels / kVector);
  return static_cast<size_t>(2 * p.channels * sizeof(double) + (2 * lanes * p.channels + 2 * p.groups) * sizeof(float));
}

__device__ void add_up(const Sums& sums, const Place& place, int64_t channels, const float (&first)[kVector],
                       const float (&second)[kVector]) {
  if (place.works) {
    for (int i = 0; i < kVector; ++i) {
      sums.parts[place.lane * channels + place.channel(i)] = first[i];
      sums.parts[(place.lanes + place.lane) * channels + place.channel(i)] = second[i];
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < 2 * channels; c += kBlock) {
    const float* part = sums.parts + (c < channels ? c : place.lanes * channels + c - channels);
    double sum = 0;
    for (int lane = 0; lane < place.lanes; ++lane) sum += part[lane * channels];
    sums.whole[c] = sum;
  }
  __syncthreads();
}

// function(x of kVector channels, g likewise, position) for every position of the thread; without kBoth x stands for g.
template <bool kBoth, class T, class Function>
__device__ __forceinline__ void each_position(const GroupNormParams& p, const Place& place, const T* x, const T* g,
                                              const Function& function) {
  constexpr int kAhead = kOnTheWay / (kBoth ? 2 : 1);
  const auto load = [&](const T* from, int64_t s) {
    return *reinterpret_cast<const Chunk<T>*>(from + s * p.channels + place.channel(0));
  };
  const int64_t positions = p.positions, step = place.lanes;
  int64_t s = place.lane;
  for (; s + (kAhead - 1) * step < positions; s += kAhead * step) {
    Chunk<T> xs[kAhead], gs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      xs[k] = load(x, s + k * step);
      gs[k] = kBoth ? load(g, s + k * step) : xs[k];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) function(xs[k], gs[k], s + k * step);
  }
  for (; s < positions; s += step) {
    const Chunk<T> v = load(x, s);
    function(v, kBoth ? load(g, s) : v, s);
  }
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kBlock, 1) forward_kernel(GroupNormParams p) {
  DYNAMIC_SHARED(memory);
  const Place place(p);
  const Sums sums(memory, p, place);
  const int64_t row = blockIdx.x, image = row * p.positions * p.channels, width = p.channels / p.groups;
  const T* x = static_cast<const T*>(p.x) + image;
  float about[kVector], first[kVector], second[kVector];
  for (int i = 0; i < kVector; ++i) {
    about[i] = place.works ? load_float(x, place.channel(i)) : 0;
    first[i] = second[i] = 0;
  }
  if (place.works) {
    each_position<false>(p, place, x, x, [&](const Chunk<T>& v, const Chunk<T>&, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float d = value_of(v, i) - about[i];
        first[i] += d;
        second[i] = fmaf(d, d, second[i]);
      }
    });
  }
  add_up(sums, place, p.channels, first, second);
  for (int64_t group = threadIdx.x; group < p.groups; group += kBlock) {
    const double positions = static_cast<double>(p.positions);
    double mean = 0, squares = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) mean += load_float(x, c) + sums.whole[c] / positions;
    mean /= static_cast<double>(width);
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const double off = load_float(x, c) + sums.whole[c] / positions - mean;
      const double within = sums.whole[p.channels + c] - sums.whole[c] * sums.whole[c] / positions;
      squares += (within > 0 ? within : within <= 0 ? 0 : within) + positions * off * off;  // rounding is dropped, NaN kept
    }
    const double rstd = 1 / sqrt(squares / (positions * static_cast<double>(width)) + p.eps);
    sums.group[group] = p.mean[row * p.groups + group] = static_cast<float>(mean);
    sums.group[p.groups + group] = p.rstd[row * p.groups + group] = static_cast<float>(rstd);
  }
  __syncthreads();
  if (!place.works) return;
  float mean[kVector], scale[kVector], shift[kVector];
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = place.channel(i), group = c / width;
    mean[i] = sums.group[group];
    scale[i] = sums.group[p.groups + group] * (p.weight ? p.weight[c] : 1.0f);
    shift[i] = p.bias ? p.bias[c] : 0.0f;
  }
  T* y = static_cast<T*>(p.y) + image;
  each_position<false>(p, place, x, x, [&](const Chunk<T>& v, const Chunk<T>&, int64_t s) {
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
    *reinterpret_cast<Chunk<T>*>(y + s * p.channels + place.channel(0)) = out;
  });
}

template <class T, bool kSilu>
__global__ void __launch_bounds__(kBlock, 1) backward_kernel(GroupNormParams p) {
  DYNAMIC_SHARED(memory);
  const Place place(p);
  const Sums sums(memory, p, place);
  const int64_t row = blockIdx.x, image = row * p.positions * p.channels, width = p.channels / p.groups;
  const T* x = static_cast<const T*>(p.x) + image;
  const T* g = static_cast<const T*>(p.g) + image;
  float mean[kVector], rstd[kVector], weight[kVector], bias[kVector], of_weight[kVector], of_bias[kVector];
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = place.works ? place.channel(i) : 0, group = row * p.groups + c / width;
    mean[i] = p.mean[group];
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
    each_position<true>(p, place, x, g, [&](const Chunk<T>& v, const Chunk<T>& dy, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float xn = (value_of(v, i) - mean[i]) * rstd[i], dz = inner(xn, value_of(dy, i), i);
        of_weight[i] = fmaf(dz, xn, of_weight[i]);
        of_bias[i] += dz;
      }
    });
  }
  add_up(sums, place, p.channels, of_weight, of_bias);
  for (int64_t c = threadIdx.x; c < p.channels; c += kBlock) {
    p.weight_rows[row * p.channels + c] = static_cast<float>(sums.whole[c]);
    p.bias_rows[row * p.channels + c] = static_cast<float>(sums.whole[p.channels + c]);
  }
  for (int64_t group = threadIdx.x; group < p.groups; group += kBlock) {
    double along = 0, level = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const double w = p.weight ? p.weight[c] : 1.0;
      along += w * sums.whole[c];
      level += w * sums.whole[p.channels + c];
    }
    const double count = static_cast<double>(p.positions) * static_cast<double>(width);
    sums.group[group] = static_cast<float>(along / count);
    sums.group[p.groups + group] = static_cast<float>(level / count);
  }
  __syncthreads();
  if (!place.works || !p.dx) return;
  float along[kVector], level[kVector];
  for (int i = 0; i < kVector; ++i) {
    along[i] = sums.group[place.channel(i) / width];
    level[i] = sums.group[p.groups + place.channel(i) / width];
  }
  T* dx = static_cast<T*>(p.dx) + image;
  each_position<true>(p, place, x, g, [&](const Chunk<T>& v, const Chunk<T>& dy, int64_t s) {
    Chunk<T> out;
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      float d[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = i + k;
        const float xn = (value_of(v, c) - mean[c]) * rstd[c], dz = inner(xn, value_of(dy, c), c);
        d[k] = rstd[c] * fmaf(-xn, along[c], fmaf(dz, weight[c], -level[c]));
      }
      set_pair(out, i, d[0], d[1]);
    }
    *reinterpret_cast<Chunk<T>*>(dx + s * p.channels + place.channel(0)) = out;
  });
}

template <class T, bool kSilu>
void launch(const char* op, const GroupNormParams& p, void* stream) {
  const unsigned grid = blocks_of(op, p.rows);
  if (p.g) {
    LAUNCH(op, (backward_kernel<T, kSilu>), grid, kBlock, shared_bytes(p), stream, p);
  } else {
    LAUNCH(op, (forward_kernel<T, kSilu>), grid, kBlock, shared_bytes(p), stream, p);
  }
}

}  // namespace

void group_norm(const GroupNormParams& p, void* stream) {
  const char* op = __func__;
  if (p.channels % kVector || p.channels > kVector * kBlock || p.channels % p.groups)
    throw std::runtime_error(std::string(op) + ": " + std::to_string(p.channels) + " channels do not fit a block");
  if (p.rows == 0 || p.positions == 0) return;
  if (p.dtype == DType::bf16) {
    p.silu ? launch<uint16_t, true>(op, p, stream) : launch<uint16_t, false>(op, p, stream);
  } else {
    p.silu ? launch<float, true>(op, p, stream) : launch<float, false>(op, p, stream);
  }
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
