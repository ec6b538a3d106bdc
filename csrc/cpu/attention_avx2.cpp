#define FASTRNN_ISA isa_avx2
#define FASTRNN_VECTOR_BYTES 32
#include "attention_kernels.h"

FASTRNN_ATTENTION(avx2)
