// Division by a number fixed at launch: one multiplication and a shift (Granlund and Montgomery 1994).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace privimage {

struct FastDiv {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)) {  // 1 ≤ d < 2^31
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  // n in [0, 2^31)
  HOST_DEVICE int quotient(int n) const {
    const uint32_t u = static_cast<uint32_t>(n);
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(u, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{u} * multiplier) >> 32);
#endif
    return static_cast<int>((high + u) >> shift);
  }
  HOST_DEVICE int divide(int n, int& remainder) const {
    const int q = quotient(n);
    remainder = n - q * static_cast<int>(divisor);
    return q;
  }
};

}  // namespace privimage
