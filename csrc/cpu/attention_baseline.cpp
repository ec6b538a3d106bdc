#define FASTRNN_ISA isa_baseline
#define FASTRNN_VECTOR_BYTES 16
#include "attention_kernels.h"

FASTRNN_ATTENTION(baseline)
