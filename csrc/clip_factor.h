// One sample's clip factor, the same bits on every backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace privimage {

// weight * min(1, C / norm) rounded toward zero, so that the float factor never lifts a contribution over C; 0 where the
// norm is not finite.
static HOST_DEVICE float clip_factor(double sq_norm, double weight, double max_grad_norm) {
  const double norm = sqrt(sq_norm);
  if (!(norm <= 0x1.fffffffffffffp+1023)) return 0;  // infinite, or NaN
  const double factor = (norm > max_grad_norm ? max_grad_norm / norm : 1.0) * weight;
  float rounded = static_cast<float>(factor);
  if (fabs(static_cast<double>(rounded)) > fabs(factor)) {
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    --bits;  // the next float toward zero
    memcpy(&rounded, &bits, sizeof bits);
  }
  return rounded;
}

}  // namespace privimage
