// What forward and backward share: where things lie, and how blocks tell each other what they found.
//
// The data is the flag. A block that needs another's h (backward: gradients of the gates) reads the place
// where it will be until no word there is kPending, to which the host has set all; a word is written once,
// whole, and never as kPending. So no fence, counter or barrier orders anything: what a word says is all that
// anyone concludes from it. That asks for a fresh place each step, and for all blocks to be resident.
#pragma once

#include "args.h"
#include "product.h"

namespace fastrnn::cuda {

// How a kernel's block is cut, the same for host and device. U: its units, of GATES gates in the stage that has
// most; STATES floats are kept of each unit and sequence.
template <int U, int WK, int GATES, int STATES>
struct Shape {
  static constexpr int kWn = kWarps / WK;
  static constexpr int kOutputs = (kRows * U + kThreads - 1) / kThreads;  // of a thread: units and sequences
  static constexpr int kRow = U * GATES + 8;        // floats from row to row of the sums: no bank twice
  static constexpr int kBuffers = U * GATES <= 64;  // one more, where there is room: a barrier less
  static constexpr int kSums = (1 + kBuffers) * WK * kRows * kRow;
  static constexpr int kKept = STATES * kRows * U;  // floats of a tile of the batch
  static_assert(U / 8 % kWn == 0);
};

// Bytes of a block's shared memory before the weights: sums, what is kept of `tiles` tiles of the batch, and in
// kBlock the places of the exchange.
template <class S>
__host__ __device__ int64_t fixed_bytes(const Args& a, int element, int64_t tiles) {
  int64_t bytes = (S::kSums + S::kKept * tiles) * 4;
  if (a.mode == kBlock) bytes += kRows * (2 * a.stride_1 + a.stride_2) * element;
  return bytes;
}

// A sequence at a step.
struct Place {
  int row;        // of y and its like; gates and mid begin at base
  bool here, on;  // whether it has that row, and runs
  bool cut;       // whether its state is zeroed before
};

template <class Bits>
__device__ __forceinline__ const Bits* as(int64_t address) {
  return reinterpret_cast<const Bits*>(address);
}
template <class Bits>
__device__ __forceinline__ Bits* to(int64_t address) {
  return reinterpret_cast<Bits*>(address);
}

// Of this block: its group, tile of units, and the threads' shares.
template <class T, int U>
struct Where {
  int d, head, HH, K, unit_0, slot_group;  // unit_0: its first unit, of its head
  int unit, first_row;                     // of this thread's outputs: row first_row + i * (kThreads / U)
  int padded;                              // HH and K up to a multiple of 8: columns that exist in an exchange
  bool works;

  __device__ __forceinline__ explicit Where(const Args& a) {
    const int group = blockIdx.z;
    d = group / int(a.heads), head = group % int(a.heads);
    HH = int(a.H / a.heads), K = int(a.P / a.heads);
    unit_0 = int(blockIdx.y) * U;
    slot_group = group;
    unit = unit_0 + int(threadIdx.x) % U;
    first_row = int(threadIdx.x) / U;
    works = int(threadIdx.x) < kRows * U;
  }
  __device__ __forceinline__ int row(int i) const { return first_row + i * (kThreads / U); }
  // Its place among what a thread keeps, and among the outputs of a tile.
  __device__ __forceinline__ int output(int i) const { return int(threadIdx.x) + i * kThreads; }
};

__device__ __forceinline__ Place place(const Args& a, int64_t s, int d, int b) {
  const int64_t t = d ? a.T - 1 - s : s;
  Place p{int(t * a.B) + b, b < a.B, false, false};
  if (a.offsets) {
    const int64_t* offset = as<int64_t>(a.offsets) + t;
    p.here = p.here && b < offset[1] - offset[0];
    p.row = int(offset[0]) + b;
  }
  p.on = p.here;
  if (a.flags && p.here) {
    const int flag = as<uint8_t>(a.flags)[(d * a.T + t) * a.B + b];
    p.on = flag & 1, p.cut = flag & 2;
  }
  return p;
}

template <class T>
__device__ __forceinline__ float read(int64_t address, int64_t index, bool there) {
  return there ? T::load(load_early(as<typename T::Bits>(address) + index)) : 0.0f;
}
template <class T>
__device__ __forceinline__ void write(int64_t address, int64_t index, float value) {
  to<typename T::Bits>(address)[index] = T::store(value);
}

// An element at `place`, beside the next thread's: all threads of a warp come here, and neighbours have
// neighbouring columns of a row.
template <class T>
__device__ __forceinline__ void publish(char* place, float value, bool there) {
  if constexpr (T::kBytes == 4) {
    if (there) store_relaxed(place, T::store(value));
  } else {
    const uint32_t own = T::store(value), other = __shfl_down_sync(0xffffffffu, own, 1);
    if (there && threadIdx.x % 2 == 0) store_relaxed(place, own | other << 16);
  }
}

// One stage's exchange: slots of [groups, B, stride], or where a block is alone places of [kRows, stride] in
// shared memory.
template <class T>
struct Exchange {
  char* base;
  int64_t apart;  // bytes from slot to slot
  int64_t row;    // from row to row
  __device__ __forceinline__ Exchange(const Args& a, int64_t address, int64_t stride, char* alone) {
    row = stride * T::kBytes;
    const bool block = a.mode == kBlock;
    const int64_t groups = a.D * a.heads;
    base = block ? alone : to<char>(address) + int64_t(blockIdx.z) * a.B * row;
    apart = block ? kRows * row : groups * a.B * row;
  }
  __device__ __forceinline__ char* slot(int64_t i) const { return base + i * apart; }
};

// The recurrent product of a stage, from its exchange into the block's sums.
template <int WK, class T, int TILES, int DEPTH, int HELD>
__device__ __forceinline__ void product(Product<T, TILES, DEPTH, HELD>& weights, const Exchange<T>& exchange, int64_t slot,
                                        int first_row, const Args& a, bool wait, float* sums, int row) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane / 4;
  // In a block that is alone all rows are there.
  const bool all = a.mode == kBlock;
  const char* source = exchange.slot(slot) + int64_t(all ? r : first_row + r) * exchange.row + lane % 4 * 16;
  const bool live_0 = all || first_row + r < a.B, live_1 = all || first_row + r + 8 < a.B;
  float acc[TILES][4];
  weights.multiply(acc, source, 8 * exchange.row, live_0, live_1, wait, a.patience, a.exact);
  if (weights.pieces > 0)
    weights.put(acc, sums + warp % WK * kRows * row + warp / WK * TILES * 8, row);
}

// The sum of a column over the parts of k.
template <int WK>
__device__ __forceinline__ float total(const float* sums, int row, int pieces, int r, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WK; w++)
    if (w < pieces) sum += sums[(w * kRows + r) * row + column];
  return sum;
}

}  // namespace fastrnn::cuda
