#define FASTRNN_ISA isa_baseline
#define FASTRNN_VECTOR_BYTES 16
#include "kernels.h"

FASTRNN_INSTRUCTION_SET(baseline)
