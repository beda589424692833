#define PRIVIMAGE_EMULATE
#include "../cuda/residual.cu"
