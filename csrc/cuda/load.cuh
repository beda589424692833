// One element of a float32 or bfloat16 array as a float. The dtype is the same for the whole launch.
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

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
