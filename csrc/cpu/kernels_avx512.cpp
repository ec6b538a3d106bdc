#define FASTRNN_ISA isa_avx512
#define FASTRNN_VECTOR_BYTES 64
#include "kernels.h"

FASTRNN_INSTRUCTION_SET(avx512)
