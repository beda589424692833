#define PRIVIMAGE_EMULATE
#include "../cuda/group_norm.cu"
