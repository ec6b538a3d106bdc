#define FASTRNN_ISA isa_avx2
#define FASTRNN_VECTOR_BYTES 32
#include "kernels.h"

FASTRNN_INSTRUCTION_SET(avx2)
