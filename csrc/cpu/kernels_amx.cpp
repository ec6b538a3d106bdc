// avx512, and products of bfloat16 by AMX.
#define FASTRNN_ISA isa_amx
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_BF16_ONLY
#include "amx.h"
// After the product that its scans are to find.
#include "kernels.h"

namespace fastrnn::cpu {

Kernels<float, Bf16> bf16_amx() { return isa_amx::kernels<float, Bf16>(); }

}  // namespace fastrnn::cpu
