// avx512, and products of bfloat16 by AMX.
#define FASTRNN_ISA isa_amx
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_BF16_ONLY
#include "amx_gradients.h"
// After the product that its scans are to find.
#include "kernels.h"

FASTRNN_BF16_KERNELS(amx, kTiles)
