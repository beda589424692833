#define PRIVIMAGE_EMULATE
#include "../cuda/clip_factors.cu"
