// Which algorithm computes a convolution's weight gradient.
#include "conv_weight_grad.h"

namespace privimage {
namespace ISA_NAMESPACE {

void conv_weight_grad(const ConvWeightGradParams& p) {
  using Algorithm = ConvWeightGradParams::Algorithm;
  if (p.samples == 0) return;
  switch (p.algorithm) {
    case Algorithm::winograd2: return conv_winograd(p, 2);
    case Algorithm::winograd4: return conv_winograd(p, 4);
    default: return conv_direct(p);
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
