// Starting a kernel, for fastrnn/cuda.py: plain C functions, which it calls with the addresses of tensors.
#include <algorithm>

#include "kernels.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastrnn::cuda {
namespace {

constexpr int kNoKernel = -1, kNotResident = -2;

Kernel kernel_for(const Args& a) {
  switch (a.dtype * 2 + (a.backward ? 1 : 0)) {
    case 0:
      return forward_float32(a);
    case 1:
      return backward_float32(a);
    case 2:
      return forward_bfloat16(a);
    case 3:
      return backward_bfloat16(a);
    case 4:
      return forward_float16(a);
    case 5:
      return backward_float16(a);
  }
  return {};
}

// Shares out what shared memory is left over pieces of the weights; all bytes that a block takes.
int64_t share_out(const Kernel& kernel, Args& a, int64_t limit) {
  const int64_t tiles = (a.B + kRows - 1) / kRows, own = (tiles + a.grid_x - 1) / a.grid_x;
  const int64_t bytes = a.dtype ? 2 : 4;
  int64_t used = kernel.fixed(a, own);
  auto share = [&](int64_t stride, int held, int columns) {
    const int64_t pieces = (stride * bytes / kPieceBytes + kernel.parts - 1) / kernel.parts;
    const int64_t wanted = std::max<int64_t>(0, pieces - (a.in_registers ? held : 0));
    const int64_t each = int64_t(kWarps) * columns * 512;
    const int64_t given = columns ? std::min(wanted, std::max<int64_t>(0, limit - used) / each) : 0;
    used += given * each;
    return given;
  };
  // A launch of a single step reads each weight once: shared memory would be a detour.
  a.shared_1 = a.mode == kStep ? 0 : share(a.stride_1, kernel.held_1, kernel.tiles_1);
  a.shared_2 = a.mode == kStep ? 0 : share(a.stride_2, kernel.held_2, kernel.tiles_2);
  return used;
}

#ifdef __CUDACC__

int64_t device_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

int start(const Kernel& kernel, const Args& args, int64_t bytes, void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(args.grid_x, args.grid_y, args.grid_z);
  Args copy = args;
  void* values[] = {&copy};
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.mode == kGrid) {
    error = cudaLaunchCooperativeKernel(function, grid, dim3(kThreads), values, bytes, queue);
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();
      return kNotResident;
    }
    return error;
  }
  return cudaLaunchKernel(function, grid, dim3(kThreads), values, bytes, queue);
}

int resident(const Kernel& kernel, int64_t bytes) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  int device = 0, blocks = 0, processors = 0;
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, bytes) || cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
    cudaGetLastError();
    return 0;
  }
  return blocks * processors;
}

#else

int64_t device_limit() { return 99 << 10; }
int most_resident = 1 << 20;

int start(const Kernel& kernel, const Args& args, int64_t bytes, void*) {
  const dim3 grid{unsigned(args.grid_x), unsigned(args.grid_y), unsigned(args.grid_z)};
  if (args.mode == kGrid && int(grid.x * grid.y * grid.z) > most_resident) return kNotResident;
  return emulated::launch(args.mode == kGrid, grid, kThreads, bytes, kernel.function, args) ? 0 : 719;
}

int resident(const Kernel&, int64_t) { return most_resident; }

#endif

}  // namespace
}  // namespace fastrnn::cuda

using namespace fastrnn::cuda;

// The fields of Args, in their order.
FASTRNN_EXPORT const char* fastrnn_cuda_fields() {
#define FASTRNN_NAME(name) #name " "
  return FASTRNN_CUDA_ARGS(FASTRNN_NAME);
#undef FASTRNN_NAME
}

// How many blocks of a launch the device holds at once; 0: it has no such kernel.
FASTRNN_EXPORT int fastrnn_cuda_resident(const Args* given) {
  Args args = *given;
  const Kernel kernel = kernel_for(args);
  if (!kernel.function) return 0;
  const int64_t limit = args.shared_limit ? args.shared_limit : device_limit();
  const int64_t bytes = share_out(kernel, args, limit);
  return bytes <= limit ? resident(kernel, bytes) : 0;
}

// Of a launch, [shared bytes, pieces a warp of each stage: all, in registers, in shared memory].
FASTRNN_EXPORT int fastrnn_cuda_plan(const Args* given, int64_t* out) {
  Args args = *given;
  const Kernel kernel = kernel_for(args);
  if (!kernel.function) return kNoKernel;
  out[0] = share_out(kernel, args, args.shared_limit ? args.shared_limit : device_limit());
  const int64_t bytes = args.dtype ? 2 : 4;
  const int64_t strides[2] = {args.stride_1, args.stride_2};
  for (int i = 0; i < 2; i++) {
    out[1 + 3 * i] = (strides[i] * bytes / kPieceBytes + kernel.parts - 1) / kernel.parts;
    out[2 + 3 * i] = args.in_registers ? (i ? kernel.held_2 : kernel.held_1) : 0;
    out[3 + 3 * i] = i ? args.shared_2 : args.shared_1;
  }
  return 0;
}

// All steps that args asks for, one launch or, in kStep, one a stage of each step. 0, kNoKernel, kNotResident (of
// kGrid: nothing has run), or a cudaError_t.
FASTRNN_EXPORT int fastrnn_cuda_run(const Args* given, void* stream) {
  Args args = *given;
  const Kernel kernel = kernel_for(args);
  if (!kernel.function) return kNoKernel;
  const int64_t limit = args.shared_limit ? args.shared_limit : device_limit();
  const int64_t bytes = share_out(kernel, args, limit);
  if (bytes > limit) return kNoKernel;
  if (args.mode != kStep) return start(kernel, args, bytes, stream);
  const int64_t begin = args.begin, end = args.end, first = args.first, last = args.last;
  for (int64_t s = begin; s < end; s++)
    for (int64_t stage = first; stage <= last; stage++) {
      args.begin = s, args.end = s + 1, args.first = args.last = stage;
      if (args.backward && s == args.T && stage == 2) continue;
      const int error = start(kernel, args, bytes, stream);
      if (error) return error;
    }
  return 0;
}

#ifdef __CUDACC__
FASTRNN_EXPORT const char* fastrnn_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
#else
FASTRNN_EXPORT const char* fastrnn_cuda_error(int) { return "a block waited in vain"; }
FASTRNN_EXPORT void fastrnn_cuda_emulation(int resident, int delayed, int seed) {
  most_resident = resident, emulated::delayed = delayed, emulated::seed = unsigned(seed);
}
#endif
