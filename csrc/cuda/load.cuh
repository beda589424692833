// One element of a float32 or bfloat16 array as a float, and the other way.
#pragma once

#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

static __device__ __forceinline__ float load_float(const float* p, int64_t i) { return p[i]; }
static __device__ __forceinline__ float load_float(const uint16_t* p, int64_t i) {
  return __uint_as_float(uint32_t{p[i]} << 16);
}
static __device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
  return dtype == DType::bf16 ? load_float(static_cast<const uint16_t*>(p), i) : load_float(static_cast<const float*>(p), i);
}

// To nearest, ties to even; NaN stays NaN, whatever its bits.
static __device__ __forceinline__ uint16_t to_bf16(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// a and, in the upper half, b: one instruction on a GPU, for where a NaN's bits do not matter.
static __device__ __forceinline__ uint32_t to_bf16_pair(float a, float b) {
#ifdef PRIVIMAGE_EMULATE
  return to_bf16(a) | uint32_t{to_bf16(b)} << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
#endif
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
