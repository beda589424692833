#define PRIVIMAGE_EMULATE
#include "../cuda/weighted_sum.cu"
