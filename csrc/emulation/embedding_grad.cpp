#define PRIVIMAGE_EMULATE
#include "../cuda/embedding_grad.cu"
