// The algorithms of conv_weight_grad; conv_weight_grad.cpp chooses.
#pragma once

#include "kernel_list.h"

namespace privimage {
namespace ISA_NAMESPACE {

void conv_direct(const ConvWeightGradParams& params);
// 3x3, stride 1, dilation 1 only; tile: 2 or 4 positions of g a side.
void conv_winograd(const ConvWeightGradParams& params, int tile);
int64_t conv_winograd_bytes(const ConvWeightGradParams& params, int tile);  // of scratch memory, for one thread

}  // namespace ISA_NAMESPACE
}  // namespace privimage
