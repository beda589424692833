// CUDA's device language for a C++ compiler: what the .cu files of this project use, on the fibers of fibers.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx ::privimage::emulation::thread_index
#define blockIdx ::privimage::emulation::block_index
#define blockDim ::privimage::emulation::block_dim
#define gridDim ::privimage::emulation::grid_dim

#define __expf(v) std::exp(v)  // glibc has a function of this name
#define __fdividef(a, b) ((a) / (b))

#define DYNAMIC_SHARED(name) unsigned char* const name = ::privimage::emulation::dynamic_shared()
#define STATIC_SHARED(type, name, count)  \
  static const char name##_site = 0;      \
  type* const name = reinterpret_cast<type*>(::privimage::emulation::static_shared(&name##_site, sizeof(type) * (count)))

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

static inline void __syncthreads() { ::privimage::emulation::sync_block(); }

namespace privimage {
namespace emulation {

// A warp operation whose lanes give and get one value each.
template <class In, class Out, void (*kCompute)(const In* const*, Out* const*)>
static inline Out collective(const char* operation, const In& in) {
  Out out;
  const WarpFunction compute = [](const unsigned char* const* ins, unsigned char* const* outs) {
    kCompute(reinterpret_cast<const In* const*>(ins), reinterpret_cast<Out* const*>(outs));
  };
  warp_collective(operation, compute, &in, sizeof in, &out, sizeof out);
  return out;
}

template <class T>
struct Shuffle {
  T value;
  int source;
};

template <class T>
static void shuffle(const Shuffle<T>* const* in, T* const* out) {
  for (int l = 0; l < kWarp; ++l) *out[l] = in[in[l]->source]->value;
}

template <class T>
static inline T shuffle_from(const char* operation, unsigned mask, T value, int source) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp operation for part of a warp is not emulated");
  return collective<Shuffle<T>, T, shuffle<T>>(operation, {value, source});
}

}  // namespace emulation
}  // namespace privimage

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ::privimage::emulation::shuffle_from("__shfl_xor_sync", mask, value, (::privimage::emulation::lane() ^ bits) & 31);
}

static inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
static inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
