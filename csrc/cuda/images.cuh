// Images of (positions, channels), channels innermost, a block each: threads take eight neighbouring channels at a time, walk over
// positions, and add up by channel. T is float or uint16_t (bfloat16).
#pragma once

#include <cstring>

#include "load.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

constexpr int kImageThreads = 512;
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
static __device__ __forceinline__ void set_pair(Chunk<float>& chunk, int i, float a, float b) {
  chunk.values[i] = a;
  chunk.values[i + 1] = b;
}
static __device__ __forceinline__ void set_pair(Chunk<uint16_t>& chunk, int i, float a, float b) {
  const uint32_t pair = to_bf16_pair(a, b);
  memcpy(&chunk.values[i], &pair, sizeof pair);
}

// What a thread has to do: the channels of one chunk at every `lanes`th position.
struct Place {
  int chunks, lanes, chunk, lane;
  bool works;

  __device__ explicit Place(int64_t channels) {
    chunks = static_cast<int>(channels) / kVector;
    lanes = kImageThreads / chunks;
    chunk = static_cast<int>(threadIdx.x) % chunks;
    lane = static_cast<int>(threadIdx.x) / chunks;
    works = lane < lanes;
  }
  __device__ int channel(int i) const { return chunk * kVector + i; }
};

// Two sums of each channel: of each thread, then of the block.
struct ChannelSums {
  double* whole;   // (2, channels)
  double* shares;  // (kImageThreads,)
  float* parts;    // (2, lanes, channels)
  float* after;    // what else the kernel asked for

  __device__ ChannelSums(unsigned char* memory, int64_t channels, const Place& place) {
    whole = reinterpret_cast<double*>(memory);
    shares = whole + 2 * channels;
    parts = reinterpret_cast<float*>(shares + kImageThreads);
    after = parts + 2 * place.lanes * channels;
  }
};

// Of dynamic shared memory, with room for `more` floats.
static inline size_t image_shared(int64_t channels, int64_t more) {
  const int64_t lanes = kImageThreads / (channels / kVector);
  return static_cast<size_t>((2 * channels + kImageThreads) * sizeof(double) + (2 * lanes * channels + more) * sizeof(float));
}

static inline void check_channels(const char* op, int64_t channels) {
  if (channels % kVector || channels > kVector * kImageThreads)
    throw std::runtime_error(std::string(op) + ": " + std::to_string(channels) + " channels do not fit a block");
}

// Called by all threads; afterwards sums.whole holds the image's.
static __device__ void add_up(const ChannelSums& sums, const Place& place, int64_t channels, const float (&first)[kVector],
                              const float (&second)[kVector]) {
  if (place.works) {
    for (int i = 0; i < kVector; ++i) {
      sums.parts[place.lane * channels + place.channel(i)] = first[i];
      sums.parts[(place.lanes + place.lane) * channels + place.channel(i)] = second[i];
    }
  }
  __syncthreads();
  // Several threads share the lanes of a sum, as many as there are; always in the same order.
  const int count = static_cast<int>(2 * channels), helpers = count < kImageThreads ? kImageThreads / count : 1;
  for (int at = static_cast<int>(threadIdx.x); at < count * helpers; at += kImageThreads) {
    const int c = at % count, helper = at / count;
    const float* part = sums.parts + (c < channels ? c : place.lanes * channels + c - channels);
    double sum = 0;
    for (int lane = helper; lane < place.lanes; lane += helpers) sum += part[lane * channels];
    (helpers == 1 ? sums.whole : sums.shares)[at] = sum;
  }
  __syncthreads();
  if (helpers == 1) return;
  if (static_cast<int>(threadIdx.x) < count) {
    double sum = 0;
    for (int helper = 0; helper < helpers; ++helper) sum += sums.shares[helper * count + threadIdx.x];
    sums.whole[threadIdx.x] = sum;
  }
  __syncthreads();
}

// function(x of kVector channels, g likewise, position) for every position of the thread; without kBoth x stands for g.
template <bool kBoth, class T, class Function>
__device__ __forceinline__ void each_position(int64_t positions, int64_t channels, const Place& place, const T* x, const T* g,
                                              const Function& function) {
  constexpr int kAhead = kOnTheWay / (kBoth ? 2 : 1);
  const auto load = [&](const T* from, int64_t s) {
    return *reinterpret_cast<const Chunk<T>*>(from + s * channels + place.channel(0));
  };
  const int64_t step = place.lanes;
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

template <class T>
__device__ __forceinline__ void store(T* to, int64_t s, int64_t channels, const Place& place, const Chunk<T>& chunk) {
  *reinterpret_cast<Chunk<T>*>(to + s * channels + place.channel(0)) = chunk;
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
