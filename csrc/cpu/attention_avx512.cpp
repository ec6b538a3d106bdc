#define FASTRNN_ISA isa_avx512
#define FASTRNN_VECTOR_BYTES 64
#include "attention_kernels.h"

FASTRNN_ATTENTION(avx512)
