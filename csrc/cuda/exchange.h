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

// How a kernel's block is cut, the same for host and device. U: its units, of GATES gates in the stage that
// has most; a block that does not share out k (WK = 1) is alone in its group.
template <int U, int WK, int GATES>
struct Shape {
  static constexpr int kWn = kWarps / WK;
  static constexpr bool kAlone = WK == 1;
  static constexpr int kOutputs = (kRows * U + kThreads - 1) / kThreads;  // of a thread: units and sequences
  static constexpr int kRow = U * GATES + 8;  // floats from row to row of the sums: no bank twice
  static constexpr int kSums = WK * kRows * kRow;
  static constexpr int kKept = 2 * kRows * U;  // floats that are kept of a tile of the batch: of h, of c
  static_assert(U / 8 % kWn == 0);
};

// Bytes of a block's shared memory before the weights: sums, what is kept of `tiles` tiles of the batch, and
// where it is alone the places of the exchange.
template <class S>
__host__ __device__ int64_t fixed_bytes(const Args& a, int element, int64_t tiles) {
  int64_t bytes = (S::kSums + S::kKept * tiles) * 4;
  if (S::kAlone) bytes += kRows * (2 * a.stride_1 + a.stride_2) * element;
  return bytes;
}

// A product of sizes that has more digits than they: one instruction, where 64-bit sizes would take several.
__device__ __forceinline__ int64_t wide(int a, int b) { return int64_t(a) * b; }

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
template <int U>
struct Where {
  int d, head, HH, K, unit_0;  // unit_0: its first unit, of its head
  int unit, first_row;         // of this thread's outputs: row first_row + i * (kThreads / U)
  bool works;

  __device__ __forceinline__ explicit Where(const Args& a) {
    const int group = blockIdx.z;
    d = group / int(a.heads), head = group % int(a.heads);
    HH = int(a.H / a.heads), K = int(a.P / a.heads);
    unit_0 = int(blockIdx.y) * U;
    unit = unit_0 + int(threadIdx.x) % U;
    first_row = int(threadIdx.x) / U;
    works = int(threadIdx.x) < kRows * U;
  }
  __device__ __forceinline__ int row(int i) const { return first_row + i * (kThreads / U); }
  // Its place among what a thread keeps, and among the outputs of a tile.
  __device__ __forceinline__ int output(int i) const { return int(threadIdx.x) + i * kThreads; }
};

__device__ __forceinline__ Place place(const Args& a, int64_t s, int d, int b) {
  const int t = int(d ? a.T - 1 - s : s);
  Place p{t * int(a.B) + b, b < a.B, false, false};
  if (a.offsets) {
    const int64_t* offset = as<int64_t>(a.offsets) + t;
    p.here = p.here && b < offset[1] - offset[0];
    p.row = int(offset[0]) + b;
  }
  p.on = p.here;
  if (a.flags && p.here) {
    const int flag = as<uint8_t>(a.flags)[wide(d * int(a.T) + t, int(a.B)) + b];
    p.on = flag & 1, p.cut = flag & 2;
  }
  return p;
}

// A number in the memory's bits, which are made a float when it is needed: to wait for a load before the wait
// for others' data would be to wait twice. 0 where there is none.
template <class T>
__device__ __forceinline__ typename T::Bits read(int64_t address, int64_t index, bool there) {
  return there ? load_early(as<typename T::Bits>(address) + index) : typename T::Bits(0);
}
template <class T>
__device__ __forceinline__ void write(int64_t address, int64_t index, float value) {
  to<typename T::Bits>(address)[index] = T::store(value);
}

// What a thread keeps of its outputs of `own` tiles, from where the launch's steps start.
template <class T, int STATES, int U>
__device__ __forceinline__ void start(const Args& a, const Where<U>& w, float* kept, int own, bool has,
                                      bool has_k, int64_t unit, int64_t column, int each, int outputs) {
  if (!w.works) return;
  for (int i = 0; i < own * outputs; i++) {
    const int tile = i / outputs, b = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows + w.row(i % outputs);
    float* state = kept + tile * each + w.output(i % outputs);
    auto first = [&](int64_t given, int64_t before, int64_t index, bool there) {
      if (!there || b >= a.B) return 0.0f;
      return a.starts ? T::load(read<T>(given, index, given != 0)) : as<float>(before)[index];
    };
    state[0] = first(a.h_start, a.h_kept, (w.d * a.B + b) * a.P + column, has_k);
    if (STATES == 2) state[kRows * U] = first(a.c_start, a.c_kept, (w.d * a.B + b) * a.H + unit, has);
  }
}

// And where they leave off.
template <class T, int STATES, int U>
__device__ __forceinline__ void leave(const Args& a, const Where<U>& w, const float* kept, int own, bool has,
                                      bool has_k, int64_t unit, int64_t column, int each, int outputs) {
  if (!w.works) return;
  for (int i = 0; i < own * outputs; i++) {
    const int tile = i / outputs, b = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows + w.row(i % outputs);
    const float* state = kept + tile * each + w.output(i % outputs);
    auto last = [&](int64_t given, int64_t after, int64_t index, float value) {
      if (a.leaves)
        write<T>(given, index, value);
      else
        to<float>(after)[index] = value;
    };
    if (b >= a.B) continue;
    if (has_k) last(a.h_left, a.h_kept, (w.d * a.B + b) * a.P + column, state[0]);
    if (STATES == 2 && has) last(a.c_left, a.c_kept, (w.d * a.B + b) * a.H + unit, state[kRows * U]);
  }
}

// An element at `place`, beside the next thread's: all threads of a warp come here, and neighbours have
// neighbouring columns of a row.
template <class T, bool ALONE>
__device__ __forceinline__ void publish(char* place, float value, bool there) {
  if constexpr (ALONE) {
    if (there) *reinterpret_cast<typename T::Bits*>(place) = T::store(value);
  } else if constexpr (T::kBytes == 4) {
    if (there) store_relaxed(place, T::store(value));
  } else {
    const uint32_t own = T::store(value), other = __shfl_down_sync(0xffffffffu, own, 1);
    if (there && threadIdx.x % 2 == 0) store_relaxed(place, own | other << 16);
  }
}

// One stage's exchange: slots of [groups, B, stride], or where a block is alone places of [kRows, stride] in
// shared memory.
template <class T, bool ALONE>
struct Exchange {
  char* base;
  int64_t apart;  // bytes from slot to slot
  int row;        // from row to row
  __device__ __forceinline__ Exchange(const Args& a, int64_t address, int64_t stride, char* alone) {
    row = int(stride) * T::kBytes;
    const int64_t groups = a.D * a.heads;
    base = ALONE ? alone : to<char>(address) + int64_t(blockIdx.z) * a.B * row;
    apart = ALONE ? int64_t(kRows * row) : groups * a.B * row;
  }
  __device__ __forceinline__ char* slot(int64_t i) const { return base + i * apart; }
};

// The slot of the first stage's exchange that step s reads: of its own, or where nobody waits one of two.
__device__ __forceinline__ int64_t slot_of(const Args& a, int64_t s) {
  return a.mode == kGrid ? s - a.origin : (s - a.origin) & 1;
}

// A product's source: 16 rows of a slot.
struct Rows {
  int64_t slot;
  int first;
};

// The recurrent product of a stage, from its exchange into the block's sums, and all of a thread's outputs
// from there: found[i][g], of its i-th output and gate g. then: the source of the block's next such product,
// whose loads then lie under this one's end, or nullptr.
template <class S, int GATES, int U, int WK, class T, int TILES, int DEPTH, int HELD, class F>
__device__ __forceinline__ void product(float (&found)[S::kOutputs][GATES],
                                        Product<T, TILES, DEPTH, HELD>& weights,
                                        const Exchange<T, S::kAlone>& exchange, Rows rows, const Rows* then,
                                        const Args& a, bool wait, int pieces, const Where<U>& w, float* sums,
                                        F meanwhile) {
  using Weights = Product<T, TILES, DEPTH, HELD>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
  auto source = [&](const Rows& of) {
    // In a block that is alone all rows are there.
    const char* place =
        exchange.slot(of.slot) + wide(S::kAlone ? r : of.first + r, exchange.row) + lane % 4 * 16;
    return typename Weights::Source{place,
                                    int64_t(8 * exchange.row),
                                    S::kAlone || of.first + r < a.B,
                                    S::kAlone || of.first + r + 8 < a.B,
                                    wait,
                                    a.eager != 0,
                                    a.patience};
  };
  float acc[TILES][4];
  weights.multiply(acc, source(rows), a.exact, meanwhile);
  if (weights.pieces > 0)
    weights.put(acc, sums + warp % WK * kRows * S::kRow + warp / WK * TILES * 8, S::kRow);
  if (then) weights.look_ahead(source(*then));
  __syncthreads();
  if (w.works) {
#pragma unroll
    for (int i = 0; i < S::kOutputs; i++)
#pragma unroll
      for (int g = 0; g < GATES; g++) {
        const float* sum = sums + w.row(i) * S::kRow + g * U + w.unit - w.unit_0;
        found[i][g] = 0.0f;
#pragma unroll
        for (int part = 0; part < WK; part++)
          if (part < pieces) found[i][g] += sum[part * kRows * S::kRow];
      }
  }
  __syncthreads();  // the next product may write its sums
}

}  // namespace fastrnn::cuda
