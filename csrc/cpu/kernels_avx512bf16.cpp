// avx512, and products of bfloat16 by its own instruction for pairs of them.
#define FASTRNN_ISA isa_avx512bf16
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_BF16_ONLY
#include "pairs.h"
// After the product that its scans are to find.
#include "kernels.h"

FASTRNN_BF16_KERNELS(avx512, kPairs)
