#include "kernels.h"

namespace fastrnn::cuda {

Kernel backward_bfloat16(const Args& args) { return find<BFloat16, true>(args); }

}  // namespace fastrnn::cuda
