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

}  // namespace ISA_NAMESPACE
}  // namespace privimage
