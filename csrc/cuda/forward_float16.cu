#include "kernels.h"

namespace fastrnn::cuda {

Kernel forward_float16(const Args& args) { return find<Float16, false>(args); }

}  // namespace fastrnn::cuda
