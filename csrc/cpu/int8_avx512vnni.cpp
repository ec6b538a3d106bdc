#define FASTRNN_ISA isa_avx512vnni
#define FASTRNN_VECTOR_BYTES 64
#include "int8_kernels.h"

namespace fastrnn::cpu {
Int8Kernels int8_avx512vnni() { return ::fastrnn::isa_avx512vnni::int8_kernels(); }
}  // namespace fastrnn::cpu
