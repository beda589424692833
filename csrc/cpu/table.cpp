// The kernels of one instruction set, as a table for dispatch.cpp.
#include "kernel_list.h"

namespace privimage {
namespace ISA_NAMESPACE {

#define PRIVIMAGE_STRING_(s) #s
#define PRIVIMAGE_STRING(s) PRIVIMAGE_STRING_(s)

extern const CpuKernels kTable;
const CpuKernels kTable = {PRIVIMAGE_STRING(PRIVIMAGE_ISA), conv_weight_grad, conv_gram, affine_grad,
                           embedding_grad, weighted_sum, gaussian_noise, private_step};

}  // namespace ISA_NAMESPACE
}  // namespace privimage
