#include "kernels.h"

namespace fastrnn::cuda {

Kernel forward_bfloat16(const Args& args) { return find<BFloat16, false>(args); }

}  // namespace fastrnn::cuda
