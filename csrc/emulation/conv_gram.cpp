#define PRIVIMAGE_EMULATE
#include "../cuda/conv_gram.cu"
