#define PRIVIMAGE_EMULATE
#include "../cuda/affine_grad.cu"
