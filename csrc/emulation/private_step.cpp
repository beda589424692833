#define PRIVIMAGE_EMULATE
#include "../cuda/private_step.cu"
