// What forward and backward share: where things lie, and how blocks tell each other what they found.
//
// Through the cache the data is the flag. A block that needs another's h (backward: gradients of the gates)
// reads the place where it will be until no word there is kPending, to which the host has set all; a word is
// written once, whole, and never as kPending. So no fence, counter or barrier orders anything: what a word
// says is all that anyone concludes from it. That asks for a fresh place each step, and for all blocks to be
// resident.
//
// In a cluster blocks push what they found into each other's shared memory, where arrivals count it. Two
// places take turns: who pushes for a step has had everybody's of the step before, whose threads tell only
// when the block has read the place of the step before that. (A projection's block may own no columns of h:
// it tells nothing of them, and is not told what only they need. It is kept in step by the other exchange.)
#pragma once

#include "args.h"
#include "product.h"

namespace fastrnn::cuda {

// Where a block finds what others tell it: in the cache, or in its own shared memory, alone in its group or
// one of a cluster.
enum class Via { kCache, kAlone, kCluster };

// How a kernel's block is cut, the same for host and device. U: its units, of GATES gates in the stage that
// has most; WN: parts of the columns, whose every warp has as many tiles of 16 in each stage.
template <int U, int WN, int GATES, Via VIA>
struct Shape {
  static constexpr int kWn = WN, kParts = kWarps / WN;  // of k
  static constexpr Via kVia = VIA;
  static constexpr bool kNear = VIA != Via::kCache;
  static constexpr int kOutputs = kRows * U / kThreads;  // of a thread: units and sequences
  static_assert(kRows * U % kThreads == 0);
  static constexpr int kColumns = (U * GATES + 15) / 16 * 16;
  static constexpr int kRow = kColumns + 4;  // floats from row to row of the sums: no bank twice
  static constexpr int kSums = kParts * kRows * kRow;
  static constexpr int kKept = 2 * kRows * U;  // floats that are kept of a tile of the batch: of h, of c
};

// Parts of the columns, at most so many, where stages have so many tiles of them. The fewer parts of k the
// fewer sums, and the more often h is read.
constexpr int parts_of_columns(int tiles_1, int tiles_2, int most) {
  int parts = most;
  while (tiles_1 % parts || tiles_2 % parts) parts /= 2;
  return parts;
}

constexpr int kMostPeers = 16;  // blocks of a cluster
constexpr int kArrivals = 32;   // bytes: of the first exchange's places two, of the second's one

// Bytes from row to row in shared memory: no two that are read at once are in the same banks.
__host__ __device__ inline int64_t near_row(int64_t stride, int element) {
  const int64_t bytes = stride * element;
  return bytes / kPieceBytes % 2 ? bytes : bytes + (bytes ? kPieceBytes : 0);
}

// Bytes of a block's shared memory before the weights: sums, what is kept of `tiles` tiles of the batch, and
// where it reads that from there the places of the exchanges.
template <class S>
__host__ __device__ int64_t fixed_bytes(const Args& a, int element, int64_t tiles) {
  int64_t bytes = (S::kSums + S::kKept * tiles) * 4;
  if (S::kNear)
    bytes += kRows * (2 * near_row(a.stride_1, element) + near_row(a.stride_2, element)) + kArrivals;
  return bytes;
}

// A product of sizes that has more digits than they: one instruction, where 64-bit sizes would take several.
__device__ __forceinline__ int64_t wide(int a, int b) { return int64_t(a) * b; }

// A number that the compiler knows.
template <int N>
struct Number {
  static constexpr int value = N;
};

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
  int rows, B, T;              // of a tile of the batch; sequences and steps of all
  int thread;
  bool masked;  // whether sequences run at some steps only

  __device__ __forceinline__ explicit Where(const Args& a) {
    const int group = blockIdx.z;
    d = group / int(a.heads), head = group % int(a.heads);
    HH = int(a.H / a.heads), K = int(a.P / a.heads);
    unit_0 = int(blockIdx.y) * U;
    thread = int(threadIdx.x);
    pin(thread);
    unit = unit_0 + thread % U;
    first_row = thread / U;
    rows = a.mode == kCluster ? int(a.tile_rows) : kRows, B = int(a.B), T = int(a.T);
    masked = a.offsets || a.flags;
    pin(rows), pin(B), pin(T);
  }
  // Blocks that own columns of h, the first ones: a projection's are fewer. Whether this one is among them.
  __device__ __forceinline__ int owners() const { return (K + U - 1) / U; }
  __device__ __forceinline__ bool owns() const { return unit_0 < K; }
  __device__ __forceinline__ int row(int i) const { return first_row + i * (kThreads / U); }
  // The sequence of its i-th output in the tile that begins with sequence first; B: none.
  __device__ __forceinline__ int sequence(int first, int i) const {
    return row(i) < rows ? first + row(i) : B;
  }
  __device__ __forceinline__ int tile(int i, const Args& a) const {
    return (int(blockIdx.x) + i * int(a.grid_x)) * rows;
  }
  // Its place among what a thread keeps, and among the outputs of a tile.
  __device__ __forceinline__ int output(int i) const { return thread + i * kThreads; }
};

__device__ __forceinline__ Place place(const Args& a, int s, int d, int b) {
  const int t = d ? int(a.T) - 1 - s : s;
  const int B = int(a.B);
  Place p{t * B + b, b < B, false, false};
  if (a.offsets) {
    const int64_t* offset = as<int64_t>(a.offsets) + t;
    p.here = p.here && b < offset[1] - offset[0];
    p.row = int(offset[0]) + b;
  }
  p.on = p.here;
  if (a.flags && p.here) {
    const int flag = as<uint8_t>(a.flags)[wide(d * int(a.T) + t, B) + b];
    p.on = flag & 1, p.cut = flag & 2;
  }
  return p;
}

// Likewise of sequence b at step s, in this group.
template <int U>
__device__ __forceinline__ Place place(const Args& a, const Where<U>& w, int s, int b) {
  if (w.masked) return place(a, s, w.d, b);
  const bool there = b < w.B;
  return {(w.d ? w.T - 1 - s : s) * w.B + b, there, there, false};
}

// A number in the memory's bits, which are made a float when it is needed: to wait for a load before the wait
// for others' data would be to wait twice. 0 where there is none.
template <class T>
__device__ __forceinline__ typename T::Bits read(int64_t address, int64_t index, bool there) {
  return there ? load_early(as<typename T::Bits>(address) + index) : typename T::Bits(0);
}
template <class T>
__device__ __forceinline__ void write(int64_t address, int64_t index, float value) {
  store(to<typename T::Bits>(address) + index, T::store(value));
}

// An element of rows that are `pitch` bytes apart.
struct Column {
  char* first;
  int pitch;
  __device__ __forceinline__ Column(int64_t address, int64_t index, int64_t width, int bytes)
      : first(reinterpret_cast<char*>(address) + index * bytes), pitch(int(width) * bytes) {
    pin(first), pin(pitch);
  }
  __device__ __forceinline__ char* at(int row) const { return beyond(first, row, pitch); }
};
template <class T>
__device__ __forceinline__ typename T::Bits read(const char* place, bool there) {
  return there ? load_early(reinterpret_cast<const typename T::Bits*>(place)) : typename T::Bits(0);
}
// Likewise, where it is needed a step later.
template <class T>
__device__ __forceinline__ uint32_t read_word(const char* place, bool there) {
  return there ? load_word(reinterpret_cast<const typename T::Bits*>(place)) : 0;
}
template <class T>
__device__ __forceinline__ void write(char* place, float value) {
  store(reinterpret_cast<typename T::Bits*>(place), T::store(value));
}

__device__ __forceinline__ void write_float(char* place, float value) {
  store(reinterpret_cast<uint32_t*>(place), float_bits(value));
}

// What a thread keeps of its outputs of `own` tiles, from where the launch's steps start.
template <class T, int STATES, int U>
__device__ __forceinline__ void start(const Args& a, const Where<U>& w, float* kept, int own, bool has,
                                      bool has_k, int64_t unit, int64_t column, int each, int outputs) {
  for (int i = 0; i < own * outputs; i++) {
    const int tile = i / outputs, b = w.sequence(w.tile(tile, a), i % outputs);
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
  for (int i = 0; i < own * outputs; i++) {
    const int tile = i / outputs, b = w.sequence(w.tile(tile, a), i % outputs);
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

// One stage's exchange: slots of [groups, B, stride], or near of [kRows, stride] in shared memory.
template <class T, Via VIA>
struct Exchange {
  static constexpr bool kNear = VIA != Via::kCache;
  char* base;
  int64_t apart;       // from slot to slot
  int row;             // from row to row
  uint64_t* arrivals;  // of the slots
  int bytes, peers;    // of an arrival; blocks of the cluster that are told, the first ones
  int thread;

  // near: its places, arrivals: theirs; rows: of this tile; used: columns.
  __device__ __forceinline__ Exchange(const Args& a, int64_t address, int64_t stride, char* near,
                                      uint64_t* arrivals, int rows, int64_t used, int peers)
      : arrivals(arrivals), bytes(rows * int(used) * T::kBytes), peers(peers) {
    row = kNear ? int(near_row(stride, T::kBytes)) : int(stride) * T::kBytes;
    const int64_t groups = a.D * a.heads;
    base = kNear ? near : to<char>(address) + int64_t(blockIdx.z) * a.B * row;
    apart = kNear ? int64_t(kRows * row) : groups * a.B * row;
    thread = int(threadIdx.x);
    if constexpr (VIA == Via::kCluster) pin(bytes), pin(this->peers);
    pin(thread);
  }
  __device__ __forceinline__ char* slot(int i) const { return base + i * apart; }

  // An element of a row (near: of the tile). All threads of a warp come here; neighbours have neighbouring
  // columns of a row, and `there` is the same for eight.
  __device__ __forceinline__ void tell(int slot, int b, int column, float value, bool there) const {
    using Bits = typename T::Bits;
    char* const place = this->slot(slot) + wide(b, row) + column * T::kBytes;
    if constexpr (VIA == Via::kAlone) {
      if (there) *reinterpret_cast<Bits*>(place) = T::store(value);
    } else if constexpr (VIA == Via::kCache) {
      if constexpr (T::kBytes == 4) {
        if (there) store_relaxed(place, value == value ? T::store(value) : 0x7fc00000u);  // not kPending
      } else {
        const uint32_t word = pair(T::store(value));
        if (there && thread % 2 == 0) store_relaxed(place, word);
      }
    } else {
      // Eight neighbours' 16 bytes, or twice those, which they push to a peer each.
      constexpr int PARTS = T::kBytes * 8 / 16;
      uint32_t word = T::store(value);
      if constexpr (T::kBytes == 2) word = pair(word);
      const int lane = thread % 32, first = lane / 8 * 8;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        auto of = [&](int i) { return __shfl_sync(kAll, word, first + (part * 4 + i) * 2 / PARTS); };
        const uint4 v{of(0), of(1), of(2), of(3)};
#pragma unroll
        for (int more = 0; more < kMostPeers; more += 8) {
          const int peer = more + lane % 8;
          push(place - lane % 8 * T::kBytes + part * 16, v, arrivals + slot, peer, there && peer < peers);
        }
      }
    }
  }

  // Until all of a slot is there; turn: how often it was before.
  __device__ __forceinline__ void wait(int slot, int turn, int patience) const {
    await(arrivals + slot, turn & 1, patience);
    if (thread == 0) expect(arrivals + slot, bytes);  // next time
  }
  // Before the first turn, by one thread.
  __device__ __forceinline__ void start(int slots) const {
    for (int i = 0; i < slots; i++) {
      start_arrival(arrivals + i);
      expect(arrivals + i, bytes);
    }
  }

 private:
  static constexpr uint32_t kAll = 0xffffffffu;
  static __device__ __forceinline__ uint32_t pair(uint32_t own) {
    return own | __shfl_down_sync(kAll, own, 1) << 16;
  }
};

// Both exchanges' places in shared memory, before anyone tells anything: zeros, as what no thread writes must
// be no NaN.
template <class T, Via VIA>
__device__ __forceinline__ void begin_near(const Exchange<T, VIA>& first, const Exchange<T, VIA>& second,
                                           char* near) {
  for (int i = threadIdx.x; i < kRows * (2 * first.row + second.row) / 4; i += kThreads)
    reinterpret_cast<uint32_t*>(near)[i] = 0;
  if constexpr (VIA == Via::kCluster) {
    if (threadIdx.x == 0) {
      first.start(2);
      if (second.row) second.start(1);
    }
    meet_cluster();
  } else {
    __syncthreads();
  }
}

// The slot of the first stage's exchange that step s reads: of its own, or near and where nobody waits one of
// two.
template <bool NEAR = false>
__device__ __forceinline__ int slot_of(const Args& a, int s) {
  return !NEAR && a.mode == kGrid ? s - int(a.origin) : (s - int(a.origin)) & 1;
}

// A product's source: 16 rows of a slot, and how often it was one before.
struct Rows {
  int slot, first, turn = 0;
};

// The recurrent product of a stage, from its exchange into the block's sums, and all of a thread's outputs
// from there: found[i][g], of its i-th output and gate g. then: the source of the block's next such product,
// whose loads then lie under this one's end, or nullptr.
template <class S, int GATES, int U, class T, int TILES, int STEP, int DEPTH, int HELD, class F>
__device__ __forceinline__ void product(float (&found)[S::kOutputs][GATES],
                                        Product<T, TILES, STEP, DEPTH, HELD, S::kNear>& weights,
                                        const Exchange<T, S::kVia>& exchange, Rows rows, const Rows* then,
                                        const Args& a, bool wait, int pieces, const Where<U>& w, float* sums,
                                        F meanwhile) {
  using Weights = Product<T, TILES, STEP, DEPTH, HELD, S::kNear>;
  using Source = typename Weights::Source;
  constexpr int WK = S::kParts;
  const int lane = w.thread % 32, warp = w.thread / 32, r = lane / 4;
  auto source = [&](const Rows& of) {
    // In shared memory all rows are there.
    const char* place = exchange.slot(of.slot) + wide(S::kNear ? r : of.first + r, exchange.row) +
                        weights.first * kPieceBytes + lane % 4 * 16;
    return Source{place,
                  int64_t(8 * exchange.row),
                  of.first + r < w.B,
                  of.first + r + 8 < w.B,
                  S::kVia == Via::kCluster ? w.rows > 8 : w.B - of.first > 8,
                  wait,
                  a.eager != 0,
                  a.patience};
  };
  float acc[TILES][2][4];
  const Source here = source(rows);
  if constexpr (S::kVia == Via::kCluster) {
    meanwhile();
    exchange.wait(rows.slot, rows.turn, int(a.patience));
    weights.multiply(acc, here, a.exact, [] {});
  } else {
    weights.multiply(acc, here, a.exact, meanwhile);
  }
  if (weights.pieces > 0)
    weights.put(acc, sums + warp % WK * kRows * S::kRow + warp / WK * TILES * 16, S::kRow, here.tall);
  if (then) weights.look_ahead(source(*then));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S::kOutputs; i++)
#pragma unroll
    for (int g = 0; g < GATES; g++) {
      const float* sum = sums + w.row(i) * S::kRow + g * U + w.unit - w.unit_0;
      // None where there is no sequence; of two outputs that would ask for a register too many.
      const bool skips = S::kOutputs == 1 && rows.first + w.row(i) >= w.B;
      const int parts = skips ? 0 : pieces;
      found[i][g] = 0.0f;
#pragma unroll
      for (int part = 0; part < WK; part++)
        if (part < parts) found[i][g] += sum[part * kRows * S::kRow];
    }
  __syncthreads();  // the next product may write its sums
}

}  // namespace fastrnn::cuda
