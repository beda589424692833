// Clipping factors: a handful of doubles, so one scalar version serves every CPU.
#include "../clip_factor.h"
#include "../kernels.h"

namespace privimage {

void clip_factors(const ClipFactorsParams& p) {
  for (int64_t b = 0; b < p.samples; ++b)
    p.factors[b] = clip_factor(p.sq_norms[b], p.sample_weight ? p.sample_weight[b] : 1.0, p.max_grad_norm);
}

}  // namespace privimage
