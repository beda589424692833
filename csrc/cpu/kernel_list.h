// Launchers of one instruction set; see kernels.h for what they promise.
#pragma once

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

void conv_weight_grad(const ConvWeightGradParams& params);
void conv_gram(const ConvGramParams& params);
void affine_grad(const AffineGradParams& params);
void embedding_grad(const EmbeddingGradParams& params);
void weighted_sum(const WeightedSumParams& params);
void gaussian_noise(const GaussianNoiseParams& params);
void private_step(const PrivateStepParams& params);
void summed_step(const SummedStepParams& params);

// Elements lo .. lo+n-1 of a layer, in stored order, added to its output. Here for summed_step, whose own file is compiled
// without contraction: a sum has the same bits in either.
void add_stored(const WeightedSumParams::Item& item, const WeightedSumParams& params, int64_t lo, int64_t n);

}  // namespace ISA_NAMESPACE
}  // namespace privimage
