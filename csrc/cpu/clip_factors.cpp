// Clipping factors: a handful of doubles, so one scalar version serves every CPU.
#include <cmath>

#include "../kernels.h"

namespace privimage {

void clip_factors(const ClipFactorsParams& p) {
  for (int64_t b = 0; b < p.samples; ++b) {
    const double norm = std::sqrt(p.sq_norms[b]);
    double factor = 0;
    if (std::isfinite(norm)) {
      factor = (norm > p.max_grad_norm ? p.max_grad_norm / norm : 1.0) * (p.sample_weight ? p.sample_weight[b] : 1.0);
    }
    float rounded = static_cast<float>(factor);
    // Toward zero, so that the float factor never lifts a contribution over C.
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(factor)) rounded = std::nextafterf(rounded, 0.0f);
    p.factors[b] = rounded;
  }
}

}  // namespace privimage
