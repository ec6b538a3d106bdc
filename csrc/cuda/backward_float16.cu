#include "kernels.h"

namespace fastrnn::cuda {

Kernel backward_float16(const Args& args) { return find<Float16, true>(args); }

}  // namespace fastrnn::cuda
