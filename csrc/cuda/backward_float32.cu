#include "kernels.h"

namespace fastrnn::cuda {

Kernel backward_float32(const Args& args) { return find<Float32, true>(args); }

}  // namespace fastrnn::cuda
