#include "kernels.h"

namespace fastrnn::cuda {

Kernel forward_float32(const Args& args) { return find<Float32, false>(args); }

}  // namespace fastrnn::cuda
