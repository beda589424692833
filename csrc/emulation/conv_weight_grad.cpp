#define PRIVIMAGE_EMULATE
#include "../cuda/conv_weight_grad.cu"
