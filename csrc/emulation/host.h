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

#define DYNAMIC_SHARED(name) unsigned char* const name = ::privimage::emulation::dynamic_shared()
#define STATIC_SHARED(type, name, count)  \
  static const char name##_site = 0;      \
  type* const name = reinterpret_cast<type*>(::privimage::emulation::static_shared(&name##_site, sizeof(type) * (count)))

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
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

static inline void ballot(const int* const* in, uint32_t* const* out) {
  uint32_t bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= uint32_t{*in[l] != 0} << l;
  for (int l = 0; l < kWarp; ++l) *out[l] = bits;
}

}  // namespace emulation
}  // namespace privimage

static inline void __syncwarp() { ::privimage::emulation::warp_collective("__syncwarp", nullptr, "", 0, nullptr, 0); }
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source) {
  return ::privimage::emulation::shuffle_from("__shfl_sync", mask, value, source & 31);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ::privimage::emulation::shuffle_from("__shfl_xor_sync", mask, value, (::privimage::emulation::lane() ^ bits) & 31);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned self = static_cast<unsigned>(::privimage::emulation::lane());
  return ::privimage::emulation::shuffle_from("__shfl_down_sync", mask, value, static_cast<int>(self + delta < 32 ? self + delta : self));
}
static inline uint32_t __ballot_sync(unsigned mask, int predicate) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp operation for part of a warp is not emulated");
  return ::privimage::emulation::collective<int, uint32_t, ::privimage::emulation::ballot>("__ballot_sync", predicate);
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T>
static inline T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
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
