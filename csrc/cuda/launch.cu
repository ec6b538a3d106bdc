// A pass's launches, for fastrnn/cuda.py: plain C functions, which it calls with the addresses of tensors.
#include <algorithm>

#include "kernels.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastrnn::cuda {
namespace {

constexpr int kNoKernel = -1, kNotResident = -2, kTooLarge = 720;  // this is CUDA's own

Kernel find_kernel(const Args& a) {
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

Kernel kernel_for(Args& a) {
  const Kernel kernel = find_kernel(a);
  if (kernel.stride_1) a.stride_1 = kernel.stride_1;
  return kernel;
}

int64_t bytes_of(const Args& a) { return a.dtype ? 2 : 4; }
int64_t pieces_of(const Args& a, int64_t stride) { return stride * bytes_of(a) / kPieceBytes; }

// Shares out what shared memory is left over pieces of the weights; all bytes that a block takes.
int64_t share_out(const Kernel& kernel, Args& a, int64_t limit) {
  const int64_t rows = a.mode == kCluster ? a.tile_rows : kRows;
  const int64_t tiles = (a.B + rows - 1) / rows, own = (tiles + a.grid_x - 1) / a.grid_x;
  int64_t used = kernel.fixed(a, own);
  auto share = [&](int64_t stride, int held, int columns) {
    const int64_t pieces = (pieces_of(a, stride) + kernel.parts - 1) / kernel.parts;
    const int64_t wanted = std::max<int64_t>(0, pieces - (a.in_registers ? held : 0));
    const int64_t each = int64_t(kernel.threads / 32) * columns * 1024;
    const int64_t given = columns ? std::min(wanted, std::max<int64_t>(0, limit - used) / each) : 0;
    used += given * each;
    return given;
  };
  // A launch of a single step reads each weight once: shared memory would be a detour.
  a.shared_1 = a.mode == kStep ? 0 : share(a.stride_1, kernel.held_1, kernel.tiles_1);
  a.shared_2 = a.mode == kStep ? 0 : share(a.stride_2, kernel.held_2, kernel.tiles_2);
  return used;
}

// Of stage 1 or 2.
Weights weights_of(const Args& a, const Kernel& kernel, int stage) {
  constexpr int kMidGates = 2;  // of GruResetBefore's first stage
  Weights w{};
  const bool mid = a.used_2 && !a.projected;
  const int64_t gates = int64_t(kernel.gates);
  w.order = kernel.order;
  w.tiles = a.grid_y, w.units = a.units;
  w.columns = stage == 1 ? kernel.columns_1 : kernel.columns_2;
  w.pieces = pieces_of(a, stage == 1 ? a.stride_1 : a.stride_2);
  w.packed = stage == 1 ? a.weights_1 : a.weights_2;
  if (stage == 2 && a.projected) {
    w.w[0] = a.w_hr_0, w.w[1] = a.w_hr_1;
    w.gates = 1, w.heads = 1, w.height = a.P, w.width = a.H;
  } else {
    w.w[0] = a.w_hh_0, w.w[1] = a.w_hh_1;
    w.first = stage == 2 ? kMidGates : 0;
    w.gates = stage == 2 ? gates - kMidGates : mid ? kMidGates : gates;
    w.heads = a.heads, w.height = a.H / a.heads, w.width = a.P / a.heads;
  }
  return w;
}

#ifdef __CUDACC__

using Queue = cudaStream_t;

int64_t device_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// What was said to the caller is not said again to who asks for the last error.
int told(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// A launch of args' grid in clusters along y.
cudaLaunchConfig_t in_clusters(const Kernel& kernel, const Args& args, int64_t bytes,
                               cudaLaunchAttribute* attribute) {
  constexpr int kPortable = 8;
  if (args.grid_y > kPortable)
    told(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {1, static_cast<unsigned>(args.grid_y), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(args.grid_x, args.grid_y, args.grid_z);
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.attrs = attribute, config.numAttrs = 1;
  return config;
}

// As much shared memory as there is, whoever asks for how much: another thread may be about to start the
// kernel.
int allow_shared(const Kernel& kernel) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  return told(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(device_limit())));
}

int start_kernel(const Kernel& kernel, const Args& args, int64_t bytes, Queue queue) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  const dim3 grid(args.grid_x, args.grid_y, args.grid_z), block(kernel.threads);
  Args copy = args;
  void* values[] = {&copy};
  if (args.mode == kCluster) {
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = in_clusters(kernel, args, bytes, &cluster);
    config.stream = queue;
    return told(cudaLaunchKernelExC(&config, function, values));
  }
  if (args.mode != kGrid) return told(cudaLaunchKernel(function, grid, block, values, bytes, queue));
  const int together = told(cudaLaunchCooperativeKernel(function, grid, block, values, bytes, queue));
  return together == cudaErrorCooperativeLaunchTooLarge ? kNotResident : together;
}

// What a question that failed says of the device: nothing runs there. But for want of memory, as for a kernel
// that is loaded when first asked about, and for what a capture forbids: that, negative, is of this moment
// alone.
int none(int error) {
  const bool captured =
      error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorStreamCaptureWrongThread;
  return error == cudaErrorMemoryAllocation || captured ? -error : 0;
}

int resident(const Kernel& kernel, const Args& args, int64_t bytes) {
  const void* function = reinterpret_cast<const void*>(kernel.function);
  int device = 0, blocks = 0, processors = 0, together = 0, error = allow_shared(kernel);
  cudaFuncAttributes compiled{};
  if (error || (error = told(cudaFuncGetAttributes(&compiled, function)))) return none(error);
  if (args.mode == kCluster) {
    constexpr int kFirst = 90;  // what this device runs may be compiled for an older one, without clusters
    cudaLaunchAttribute cluster;
    int clusters = 0;
    const cudaLaunchConfig_t config = in_clusters(kernel, args, bytes, &cluster);
    if (compiled.ptxVersion < kFirst) return 0;
    error = told(cudaOccupancyMaxActiveClusters(&clusters, function, &config));
    return error ? none(error) : clusters * static_cast<int>(args.grid_y);
  }
  if ((error =
           told(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kernel.threads, bytes))) ||
      (error = told(cudaGetDevice(&device))) ||
      (error = told(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))) ||
      (error = told(cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device))))
    return none(error);
  return args.mode == kGrid && !together ? 0 : blocks * processors;
}

int has_image() {
  cudaFuncAttributes compiled{};
  const int error = told(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(prepare<Float32>)));
  return error ? none(error) : 1;
}

template <class T>
int start_prepare(unsigned blocks, const Args& a, const Weights& first, const Weights& second,
                  int64_t parts_1, int64_t parts_2, int64_t places, Queue queue) {
  Args args = a;
  Weights weights[] = {first, second};
  void* values[] = {&args, &weights[0], &weights[1], &parts_1, &parts_2, &places};
  const void* function = reinterpret_cast<const void*>(prepare<T>);
  return told(cudaLaunchKernel(function, dim3(blocks), dim3(kThreads), values, 0, queue));
}

int fill(int64_t to, int value, int64_t bytes, Queue queue) {
  return told(cudaMemsetAsync(reinterpret_cast<void*>(to), value, bytes, queue));
}
// `width` bytes of each of so many rows.
int clear_columns(int64_t to, int64_t pitch, int64_t width, int64_t rows, Queue queue) {
  return told(cudaMemset2DAsync(reinterpret_cast<void*>(to), pitch, 0, width, rows, queue));
}
int copy(int64_t to, int64_t from, int64_t bytes, Queue queue) {
  return told(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                              cudaMemcpyDeviceToDevice, queue));
}

#else

using Queue = void*;
int most_resident = 1 << 20;

int64_t device_limit() { return 99 << 10; }
int allow_shared(const Kernel&) { return 0; }
int start_kernel(const Kernel& kernel, const Args& args, int64_t bytes, Queue) {
  const dim3 grid{unsigned(args.grid_x), unsigned(args.grid_y), unsigned(args.grid_z)};
  if (args.mode == kGrid && int(grid.x * grid.y * grid.z) > most_resident) return kNotResident;
  return emulated::launch(args.mode == kGrid || args.mode == kCluster, grid, kernel.threads, bytes,
                          kernel.function, args)
             ? 0
             : 719;
}
int resident(const Kernel&, const Args&, int64_t) { return most_resident; }
int has_image() { return most_resident < 0 ? most_resident : 1; }
template <class T>
int start_prepare(unsigned, const Args& a, const Weights& first, const Weights& second, int64_t parts_1,
                  int64_t parts_2, int64_t places, Queue) {
  return emulated::launch(false, dim3{1, 1, 1}, kThreads, 0, prepare<T>, a, first, second, parts_1, parts_2,
                          places)
             ? 0
             : 719;
}
int fill(int64_t to, int value, int64_t bytes, Queue) {
  std::memset(reinterpret_cast<void*>(to), value, bytes);
  return 0;
}
int clear_columns(int64_t to, int64_t pitch, int64_t width, int64_t rows, Queue) {
  for (int64_t i = 0; i < rows; i++) std::memset(reinterpret_cast<char*>(to) + i * pitch, 0, width);
  return 0;
}
int copy(int64_t to, int64_t from, int64_t bytes, Queue) {
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return 0;
}

#endif

// The places of the exchange, fresh for a launch of so many steps, and where `weights`, these packed.
int make_ready(const Args& a, const Kernel& kernel, bool weights, int64_t steps, Queue queue) {
  const int64_t bytes = bytes_of(a), rows = a.D * a.heads * a.B;
  const bool near = a.mode == kBlock || a.mode == kCluster;
  if (!near) {
    int error = 0;
    int64_t slots = a.mode == kGrid ? steps + 1 : 2;
    const bool goes_on = a.backward && !a.starts;  // the first slot is what the launch before told last
    for (int stage = 1; stage <= 2; stage++) {
      const int64_t used = stage == 1 ? a.used_1 : a.used_2, stride = stage == 1 ? a.stride_1 : a.stride_2;
      if (!used) continue;
      const int64_t place = stage == 1 ? a.exchange_1 : a.exchange_2, slot = rows * stride * bytes;
      if (stage == 2) slots = a.mode == kGrid ? steps : 2;
      const int64_t skip = stage == 1 && goes_on ? 1 : 0;
      // kPending; who does not wait reads zeros past what exists.
      error =
          error ? error : fill(place + skip * slot, a.mode == kGrid ? 0xff : 0, (slots - skip) * slot, queue);
      if (a.mode == kGrid && used < stride && !error)
        error =
            clear_columns(place + used * bytes, stride * bytes, (stride - used) * bytes, slots * rows, queue);
    }
    if (error) return error;
  }
  const Weights first = weights_of(a, kernel, 1), second = weights_of(a, kernel, 2);
  const int64_t groups = a.D * a.heads, parts_1 = weights ? first.parts(groups) : 0;
  const int64_t parts_2 = weights && a.used_2 ? second.parts(groups) : 0;
  const int64_t places = a.backward || near ? 0 : rows * a.stride_1;
  const int64_t all = parts_1 + parts_2 + places;
  if (!all) return 0;
  const auto blocks = unsigned(std::min<int64_t>((all + kThreads - 1) / kThreads, 1 << 12));
  switch (a.dtype) {
    case 0:
      return start_prepare<Float32>(blocks, a, first, second, parts_1, parts_2, places, queue);
    case 1:
      return start_prepare<BFloat16>(blocks, a, first, second, parts_1, parts_2, places, queue);
    default:
      return start_prepare<Float16>(blocks, a, first, second, parts_1, parts_2, places, queue);
  }
}

int64_t limit_of(const Args& a) { return a.shared_limit ? a.shared_limit : device_limit(); }

}  // namespace
}  // namespace fastrnn::cuda

using namespace fastrnn::cuda;

// The fields of Args, in their order.
FASTRNN_EXPORT const char* fastrnn_cuda_fields() {
#define FASTRNN_NAME(name) #name " "
  return FASTRNN_CUDA_ARGS(FASTRNN_NAME);
#undef FASTRNN_NAME
}

// [blocks of a launch that the device holds at once (0: none, for want of a kernel, of shared memory or of
// such clusters; negative: a cudaError_t that may not come again), a block's bytes of shared memory, then of
// each stage a warp's pieces of the weights: all, in registers, in shared memory; bytes of the packed
// weights].
FASTRNN_EXPORT void fastrnn_cuda_plan(const Args* given, int64_t* out) {
  Args args = *given;
  std::fill(out, out + 10, 0);
  const Kernel kernel = kernel_for(args);
  if (!kernel.function) return;
  const int64_t limit = limit_of(args);
  out[1] = share_out(kernel, args, limit);
  out[0] = out[1] <= limit ? resident(kernel, args, out[1]) : 0;
  for (int stage = 1; stage <= 2; stage++) {
    int64_t* of = out + 2 + 4 * (stage - 1);
    of[0] = (pieces_of(args, stage == 1 ? args.stride_1 : args.stride_2) + kernel.parts - 1) / kernel.parts;
    of[1] = args.in_registers ? (stage == 1 ? kernel.held_1 : kernel.held_2) : 0;
    of[2] = stage == 1 ? args.shared_1 : args.shared_2;
    of[3] = weights_of(args, kernel, stage).parts(args.grid_z) * 16;
  }
}

// Whether the library has kernels that the current device runs; negative: as above.
FASTRNN_EXPORT int fastrnn_cuda_has_image() { return has_image(); }

// All steps from begin to end: one launch each `slots - 1` steps or, in kStep, one a stage of each step.
// weights: whether they are to be packed. 0, kNoKernel, kNotResident (of kGrid: nothing has run), or a
// cudaError_t.
FASTRNN_EXPORT int fastrnn_cuda_run(const Args* given, int weights, void* stream) {
  Args args = *given;
  const auto queue = static_cast<Queue>(stream);
  const Kernel kernel = kernel_for(args);
  if (!kernel.function) return kNoKernel;
  const int64_t limit = limit_of(args), bytes = share_out(kernel, args, limit);
  if (bytes > limit) return kNoKernel;
  if (const int error = allow_shared(kernel)) return error;
  const int64_t begin = args.begin, end = args.end, most = args.mode == kGrid ? args.slots - 1 : end - begin;
  const bool starts = args.starts, leaves = args.leaves;
  const int64_t slot = args.D * args.heads * args.B * args.stride_1 * bytes_of(args);
  for (int64_t from = begin; from < end; from += most) {
    const int64_t to = std::min(end, from + most);
    args.begin = args.origin = from, args.end = to;
    args.starts = starts && from == begin, args.leaves = leaves && to == end;
    int error = 0;
    if (args.backward && !args.starts)
      error = copy(args.exchange_1, args.exchange_1 + most * slot, slot, queue);
    error = error ? error : make_ready(args, kernel, weights && from == begin, to - from, queue);
    if (error) return error;
    if (args.mode != kStep) {
      error = start_kernel(kernel, args, bytes, queue);
      if (error == kNotResident && from > begin) return kTooLarge;  // some steps have run
      if (error) return error;
      continue;
    }
    const int64_t first = args.first, last = args.last;
    for (int64_t s = from; s < to; s++) {
      const int64_t until = args.backward && s == args.T ? first : last;  // what is left then has one stage
      for (int64_t stage = first; stage <= until; stage++) {
        Args one = args;
        one.begin = s, one.end = s + 1, one.first = one.last = stage;
        one.starts = args.starts && s == from && stage == first;
        one.leaves = args.leaves && s + 1 == to && stage == until;
        error = start_kernel(kernel, one, bytes, queue);
        if (error) return error;
      }
    }
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
