// The forward kernel of clusters, for cells of one stage in 16 bits: all that forward.h's does there, by
// another division of a block's work, in which nothing waits for the whole block.
//
// Eight units belong to two warps, a *pair*, each of which multiplies every other piece of k with their
// gates' rows: a tile of 16 rows has two gates of the eight units, so that a lane's sums are gates of one
// unit and of two neighbouring sequences. The warps swap halves of their sums, the even sequences' for the
// odd ones', and each lane has all gates of a unit of a sequence: it is that cell, and the eight lanes of a
// sequence have the 16 bytes of h that go to each peer.
#pragma once

#include "../cells/registry.h"
#include "exchange.h"

namespace fastrnn::cuda {

// CHUNKS: of 128 columns of h; HALVES: of 16 sequences, which have pairs of their own, or 1: a pair has all.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
struct ClusterForward {
  static constexpr int G = Cell::kGates, STATES = Cell::kStates, SAVED = Cell::kSaved;
  static constexpr int kPairs = U / 8, kThreads = 64 * kPairs * HALVES;
  static constexpr int kParts = 2;                                             // of k
  static constexpr int kTiles1 = (Cell::kGates + 1) / 2;                       // of a pair
  static constexpr int kColumns1 = kPairs * kTiles1;                           // of the block
  static constexpr int kStride1 = CHUNKS * 128;                                // columns of h
  static constexpr int kPieces = kStride1 * T::kBytes / kPieceBytes / kParts;  // of a warp
  static constexpr bool kTall = HALVES == 1 && U > 16;  // whether a pair may have more than 8 sequences
  static constexpr int kHeld = kPieces;                 // in registers, all
  static_assert(T::kBytes == 2);
  // Places of the exchange, in bytes, and of the swaps: of two steps, each warp's, of 8 or of 16 sequences.
  static constexpr int kRow = kStride1 * T::kBytes + kPieceBytes;
  static constexpr int kPlace = kRows * kRow;
  static constexpr int kSwap = kThreads * (HALVES == 1 ? 2 : 1) * 16;
  static constexpr int kFixed = 2 * kPlace + 2 * kSwap + kArrivals;

  const Args& a;
  int thread, r, q, part, pair, half;  // r: of eight units; q: of four columns
  int d, B, peers;
  int row_0, live, bytes;  // the tile's first sequence, how many it has, of how many bytes a turn is
  int unit_of_head, unit;
  bool has;  // a unit
  bool masked;

  __device__ __forceinline__ explicit ClusterForward(const Args& a) : a(a) {
    thread = int(threadIdx.x);
    pin(thread);
    const int warp = thread / 32;
    r = thread % 32 / 4, q = thread % 4, part = warp % 2, pair = warp / 2 % kPairs, half = warp / 2 / kPairs;
    const int heads = int(a.heads), head = int(blockIdx.z) % heads, HH = int(a.H) / heads;
    d = int(blockIdx.z) / heads, B = int(a.B), peers = int(a.grid_y);
    row_0 = int(blockIdx.x) * int(a.tile_rows);
    live = B - row_0 < int(a.tile_rows) ? B - row_0 : int(a.tile_rows);
    bytes = live * int(a.used_1) * T::kBytes;
    unit_of_head = int(blockIdx.y) * U + pair * 8 + r;
    unit = head * HH + unit_of_head;
    has = unit_of_head < HH;
    masked = a.offsets || a.flags;
    pin(r), pin(q), pin(part), pin(half), pin(peers), pin(live), pin(bytes);
  }

  __device__ __forceinline__ void run() {
    prepare();
    all_steps();
    meet_cluster();  // a peer may still push
  }

 private:
  static constexpr bool kAdds = Cell::kSums;  // see forward.h
  using Bits = typename T::Bits;

  uint4 held[kHeld][kTiles1][2];
  char* near;  // the places of the exchange, those of the swaps, arrivals
  float bias_x[G], bias_h[G];

  __device__ __forceinline__ uint64_t* arrival(int slot) const {
    return reinterpret_cast<uint64_t*>(near + 2 * kPlace + 2 * kSwap) + slot;
  }
  __device__ __forceinline__ void prepare();
  template <bool MASKED>
  __device__ __forceinline__ Place find(int s, int col) const;
  __device__ __forceinline__ void tell(int slot, int col, float value, bool there) const;
  template <bool TALL, class F>
  __device__ __forceinline__ void multiply(float (&acc)[kTiles1][2][4], const char* from, F meanwhile) const;
  template <bool TALL, bool MASKED>
  __device__ __forceinline__ void steps();
  __device__ __forceinline__ void all_steps();
};

// The weights, the biases and the first turn of both places.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterForward<Cell, T, U, CHUNKS, HALVES>::prepare() {
  FASTRNN_SHARED(shared);
  near = reinterpret_cast<char*>(shared);
  const int64_t block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const uint4* const packed = as<uint4>(a.weights_1) + block * (kParts * kPieces) * kColumns1 * 64 +
                              (part * kColumns1 + pair * kTiles1) * 64 + thread % 32;
  constexpr int APART = kColumns1 * 64 * kParts;
#pragma unroll
  for (int j = 0; j < kHeld; j++)
#pragma unroll
    for (int n = 0; n < kTiles1 * 2; n++) held[j][n / 2][n % 2] = packed[j * APART + n * 32];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const int64_t ih = d ? a.b_ih_1 : a.b_ih_0, hh = d ? a.b_hh_1 : a.b_hh_0;
    bias_x[g] = T::load(read<T>(ih, g * a.H + unit, has && ih));
    bias_h[g] = T::load(read<T>(hh, g * a.H + unit, has && hh));
    if (kAdds) bias_x[g] += bias_h[g], bias_h[g] = 0.0f;
  }
  // Zeros, as what no thread writes must be no NaN.
  for (int i = thread; i < 2 * kPlace / 4; i += kThreads) reinterpret_cast<uint32_t*>(near)[i] = 0;
  if (thread == 0)
    for (int i = 0; i < 2; i++) {
      start_arrival(arrival(i));
      expect(arrival(i), bytes);
    }
  meet_cluster();
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
template <bool MASKED>
__device__ __forceinline__ Place ClusterForward<Cell, T, U, CHUNKS, HALVES>::find(int s, int col) const {
  const int b = row_0 + col;
  const bool there = col < live && s < int(a.end);
  if (MASKED && there) return place(a, s, d, b);
  return {(d ? int(a.T) - 1 - s : s) * B + b, there, there, false};
}

// A sequence's h of eight units to all peers. All lanes come here; `there` is the same for a sequence's.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterForward<Cell, T, U, CHUNKS, HALVES>::tell(int slot, int col,
                                                                                 float value,
                                                                                 bool there) const {
  constexpr uint32_t kAll = 0xffffffffu;
  uint32_t word = T::store(value);
  word |= __shfl_down_sync(kAll, word, 4) << 16;
  auto of = [&](int i) { return __shfl_sync(kAll, word, i * 8 + q); };
  const uint4 v{of(0), of(1), of(2), of(3)};
  char* const to = near + slot * kPlace + col * kRow + (unit_of_head - r) * T::kBytes;
  push(to, v, arrival(slot), r, there && r < peers);
  push(to, v, arrival(slot), r + 8, there && r + 8 < peers);
}

// acc [tile, .]: of the first and the last eight sequences, or of those eight in two parts. meanwhile: done
// while the tensor cores are at it.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
template <bool TALL, class F>
__device__ __forceinline__ void ClusterForward<Cell, T, U, CHUNKS, HALVES>::multiply(
    float (&acc)[kTiles1][2][4], const char* from, F meanwhile) const {
  constexpr int DEPTH = TALL ? 2 : kPieces < 4 ? kPieces : 4;
#pragma unroll
  for (int n = 0; n < kTiles1; n++)
#pragma unroll
    for (int i = 0; i < 8; i++) acc[n][i / 4][i % 4] = 0.0f;
  uint4 b[DEPTH][TALL ? 2 : 1];
  auto fetch = [&](int j) {
    b[j % DEPTH][0] = load_shared(from + j * kParts * kPieceBytes);
    if constexpr (TALL) b[j % DEPTH][1] = load_shared(from + j * kParts * kPieceBytes + 8 * kRow);
  };
#pragma unroll
  for (int j = 0; j < DEPTH; j++) fetch(j);
#pragma unroll
  for (int j = 0; j < kPieces; j++) {
    const uint4(&w)[kTiles1][2] = held[j];
    const uint4(&part)[TALL ? 2 : 1] = b[j % DEPTH];
    if constexpr (TALL) {
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int n = 0; n < kTiles1; n++)
            T::add(acc[n][half], true, w[n][step], step ? part[half].z : part[half].x,
                   step ? part[half].w : part[half].y);
    } else {
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int n = 0; n < kTiles1; n++)
          T::add(acc[n][step], true, w[n][step], step ? part[0].z : part[0].x, step ? part[0].w : part[0].y);
    }
    if (j + DEPTH < kPieces) fetch(j + DEPTH);
    if (j == 0) meanwhile();
  }
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
template <bool TALL, bool MASKED>
__device__ __forceinline__ void ClusterForward<Cell, T, U, CHUNKS, HALVES>::steps() {
  constexpr int OUT = TALL ? 2 : 1;
  auto col = [&](int i) { return 2 * q + part + 8 * (half + i); };
  const int begin = int(a.begin), H = int(a.H);
  int end = int(a.end);
  pin(end);
  const int rows_0 = int(d * a.rows - (d ? a.base_1 : a.base_0)), gate_bytes = H * T::kBytes;
  const Column gates_at(a.gates, wide(rows_0, SAVED * H) + unit, SAVED * H, T::kBytes);
  const Column y_at(a.y, d * a.P + unit, a.D * a.P, T::kBytes);
  const Column seq_at(a.seq, d * a.N * a.H + unit, H, 4);
  char *mine = near + 2 * kPlace + thread * 16, *theirs = near + 2 * kPlace + (thread ^ 32) * 16;  // swaps
  const char* from = near + (8 * half + r) * kRow + part * kPieceBytes + q * 16;  // of the exchange
  pin(mine), pin(theirs), pin(from);

  // Of each output: h and c; where the step before lies, this one and the next one; what the next one has of
  // x; and what the step before found and has not yet shown.
  float h[OUT] = {}, c[OUT] = {};
  Place was[OUT] = {}, now[OUT], then[OUT];
  uint32_t x[OUT][G];
  Vec<float, SAVED> saved[OUT];
  auto look = [&](uint32_t (&x)[G], const Place& at) {
    const char* const from = gates_at.at(at.row);
#pragma unroll
    for (int g = 0; g < G; g++) x[g] = read_word<T>(beyond(from, gate_bytes, g), at.on && has);
  };
  auto show = [&](int i) {
    const Place& at = was[i];
    if (has && at.here) {
      write<T>(y_at.at(at.row), at.on ? h[i] : 0.0f);
      if (STATES == 2 && a.seq) write_float(seq_at.at(at.row), at.on ? c[i] : 0.0f);
    }
    if (has && at.on && a.save) {
#pragma unroll
      for (int g = 0; g < SAVED; g++) write<T>(beyond(gates_at.at(at.row), gate_bytes, g), saved[i][g]);
    }
  };
#pragma unroll
  for (int i = 0; i < OUT; i++) {
    const int64_t b = d * a.B + row_0 + col(i);
    auto first = [&](int64_t given, int64_t before, int64_t index) {
      if (!has || col(i) >= live) return 0.0f;
      return a.starts ? T::load(read<T>(given, index, given != 0)) : as<float>(before)[index];
    };
    h[i] = first(a.h_start, a.h_kept, b * a.H + unit);
    c[i] = STATES == 2 ? first(a.c_start, a.c_kept, b * a.H + unit) : 0.0f;
    now[i] = find<MASKED>(begin, col(i)), then[i] = find<MASKED>(begin + 1, col(i));
    look(x[i], now[i]);
    tell(0, col(i), now[i].cut ? 0.0f : h[i], col(i) < live);
  }

  auto step = [&](int s, auto parity) {
    constexpr int slot = decltype(parity)::value;
    await(arrival(slot), (s - begin) / 2 & 1, int(a.patience));
    float acc[kTiles1][2][4];
    multiply<TALL>(acc, from + slot * kPlace, [&] {
#pragma unroll
      for (int i = 0; i < OUT; i++) {
        show(i);
      }
    });
    float sums[OUT][4] = {};
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      float give[4] = {};
#pragma unroll
      for (int n = 0; n < kTiles1; n++)
#pragma unroll
        for (int g = 0; g < 2; g++) {
          float even = acc[n][i][2 * g], odd = acc[n][i][2 * g + 1];
          if constexpr (!TALL) even += acc[n][1][2 * g], odd += acc[n][1][2 * g + 1];
          sums[i][2 * n + g] = part ? odd : even, give[2 * n + g] = part ? even : odd;
        }
      store_shared(mine + slot * kSwap + i * kThreads * 16,
                   {float_bits(give[0]), float_bits(give[1]), float_bits(give[2]), float_bits(give[3])});
    }
    meet_some(1 + thread / 64, 64);
    Vec<float, STATES> after[OUT];
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const uint4 more = load_shared(theirs + slot * kSwap + i * kThreads * 16);
      const float others[4] = {bits_float(more.x), bits_float(more.y), bits_float(more.z),
                               bits_float(more.w)};
      Vec<float, STATES> before;
      before[0] = now[i].cut ? 0.0f : h[i];
      if constexpr (STATES == 2) before[1] = now[i].cut ? 0.0f : c[i];
      Vec<float, G> gx, gh;
#pragma unroll
      for (int g = 0; g < G; g++) gx[g] = T::load(Bits(x[i][g])) + bias_x[g], gh[g] = sums[i][g] + others[g];
      if constexpr (!kAdds) {
#pragma unroll
        for (int g = 0; g < G; g++) gh[g] += bias_h[g];
      }
      look(x[i], then[i]);
      Cell::forward(gx, gh, before, after[i], saved[i]);
    }
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      if (now[i].on) {
        h[i] = after[i][0];
        if constexpr (STATES == 2) c[i] = after[i][1];
      }
      tell(slot ^ 1, col(i), has && !then[i].cut ? h[i] : 0.0f, col(i) < live && s + 1 < end);
    }
    if (thread == 0) expect(arrival(slot), bytes);  // next time
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      was[i] = now[i], now[i] = then[i], then[i] = find<MASKED>(s + 2, col(i));
    }
  };
  for (int s = begin; s < end; s++) {
    step(s, Number<0>{});
    if (++s >= end) break;
    step(s, Number<1>{});
  }
#pragma unroll
  for (int i = 0; i < OUT; i++) {
    show(i);
    const int64_t b = d * a.B + row_0 + col(i);
    auto last = [&](int64_t given, int64_t after, int64_t index, float value) {
      if (!has || col(i) >= live) return;
      if (a.leaves)
        write<T>(given, index, value);
      else
        to<float>(after)[index] = value;
    };
    last(a.h_left, a.h_kept, b * a.H + unit, h[i]);
    if (STATES == 2) last(a.c_left, a.c_kept, b * a.H + unit, c[i]);
  }
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterForward<Cell, T, U, CHUNKS, HALVES>::all_steps() {
  // A pair without units or sequences tells nothing, so that nothing would keep it in step with the others.
  if (unit_of_head - r < a.used_1 && 8 * half < live) {
    if constexpr (kTall) {
      if (live > 8) return masked ? steps<true, true>() : steps<true, false>();
    }
    masked ? steps<false, true>() : steps<false, false>();
  }
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
__global__ void __launch_bounds__(8 * U * HALVES, 1) scan_cluster_forward(const __grid_constant__ Args a) {
  if constexpr (!kClusters)
    give_up();
  else
    ClusterForward<Cell, T, U, CHUNKS, HALVES>(a).run();
}

}  // namespace fastrnn::cuda
