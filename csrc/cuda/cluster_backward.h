// The backward kernel of clusters, for cells of one stage in 16 bits: all that backward.h's does there, by
// another division of the work. A block multiplies the gradients of its own units' gates, which it has in its
// own shared memory, with all columns of R, and pushes each peer the part of its units' gradients of h:
// partial sums in float32, of all blocks, which a lane there adds in their order. That is half of the bytes,
// in 16 bits, that the gradients of the gates would be, and what a lane holds of a product is 16 bytes as
// they are sent.
#pragma once

#include "../cells/registry.h"
#include "backward.h"

namespace fastrnn::cuda {

// See cluster_forward.h. Warps have column tiles of R: of 16 units of a peer.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
struct ClusterBackward {
  static constexpr int G = Cell::kGates, STATES = Cell::kStates, SAVED = Cell::kSaved, GRADS = Cell::kGrads;
  static constexpr int kGroup = 8 * U, kThreads = kGroup * HALVES;  // threads of 8 sequences, or of all
  static constexpr int kSenders = CHUNKS * 128 / U, kSub = U / 16;  // blocks; tiles of a block's units
  static constexpr int kColumns1 = CHUNKS * 8, kTiles1 = kColumns1 / (kGroup / 32);  // tiles: all, a warp's
  static constexpr int kParts = 1;
  static constexpr int kPieces = (G * U * T::kBytes + kPieceBytes - 1) / kPieceBytes;  // of k
  static constexpr int kStride1 = kPieces * kPieceBytes / T::kBytes;
  static constexpr int kHeld = kPieces;  // in registers, all
  static_assert(T::kBytes == 2);
  static constexpr bool kTall = HALVES == 1 && U > 16;
  static constexpr int kRow = (kPieces + (kPieces % 2 ? 0 : 1)) * kPieceBytes;  // of a sequence's gradients
  static constexpr int kOwn = kRows * kRow;                                     // of a step's
  static constexpr int kTile = 2 * 32 * 16,
                       kPlace = kSenders * kSub * kTile;  // what is sent: of 16 sequences
  static constexpr int kFixed = 2 * kPlace + 2 * kOwn + kArrivals;

  const Args& a;
  int thread, r, q, warp, half;  // r: of eight units; q: of four pairs of sequences; warp: of its group
  int d, B, H, peers;
  int row_0, live, bytes;  // the tile's first sequence, how many it has, of how many bytes a turn is
  int unit_of_block, unit, first_col;  // of this lane's output
  bool has, masked;

  __device__ __forceinline__ explicit ClusterBackward(const Args& a) : a(a) {
    thread = int(threadIdx.x);
    pin(thread);
    r = thread % 32 / 4, q = thread % 4, warp = thread / 32 % (kGroup / 32), half = thread / kGroup;
    const int heads = int(a.heads), head = int(blockIdx.z) % heads, HH = int(a.H) / heads;
    d = int(blockIdx.z) / heads, B = int(a.B), H = int(a.H), peers = int(a.grid_y);
    row_0 = int(blockIdx.x) * int(a.tile_rows);
    live = B - row_0 < int(a.tile_rows) ? B - row_0 : int(a.tile_rows);
    bytes = peers * kSub * 8 * 16 * ((live + 1) / 2);
    // Of what a tile's 32 lanes send, 4 floats each, a warp adds those of one q: of 16 units, two sequences.
    const int index = thread % 32 / 8;
    unit_of_block = warp / 4 * 16 + index / 2 * 8 + thread % 8;
    first_col = warp % 4 * 2 + index % 2 + 8 * half;
    unit = head * HH + int(blockIdx.y) * U + unit_of_block;
    has = int(blockIdx.y) * U + unit_of_block < HH;
    masked = a.offsets || a.flags;
    pin(r), pin(q), pin(warp), pin(half), pin(peers), pin(live), pin(bytes), pin(unit_of_block);
  }

  __device__ __forceinline__ void run() {
    prepare();
    all_steps();
    meet_cluster();  // a peer may still push
  }

 private:
  using Bits = typename T::Bits;

  // What a step reads of a sequence.
  struct Step {
    Place at;
    uint32_t saved[SAVED], dy, h_before, dc_seq, c_before, c_new;
  };

  uint4 held[kHeld][kTiles1][2];
  // What peers sent, the gradients of this block's gates, each of two steps; arrivals.
  char* near;

  __device__ __forceinline__ uint64_t* arrival(int slot) const {
    return reinterpret_cast<uint64_t*>(near + 2 * kPlace + 2 * kOwn) + slot;
  }
  __device__ __forceinline__ void prepare();
  template <bool MASKED>
  __device__ __forceinline__ Place find(int step, int col) const;
  __device__ __forceinline__ void multiply(float (&acc)[kTiles1][4], const char* from) const;
  template <bool TALL, bool MASKED>
  __device__ __forceinline__ void steps();
  __device__ __forceinline__ void all_steps();
};

// The weights, zeros where nobody writes, and the first turn of both places.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterBackward<Cell, T, U, CHUNKS, HALVES>::prepare() {
  FASTRNN_SHARED(shared);
  near = reinterpret_cast<char*>(shared);
  constexpr int APART = kColumns1 * 64;
  const int64_t block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const uint4* const packed =
      as<uint4>(a.weights_1) + block * kPieces * APART + warp * kTiles1 * 64 + thread % 32;
#pragma unroll
  for (int j = 0; j < kHeld; j++)
#pragma unroll
    for (int n = 0; n < kTiles1 * 2; n++) held[j][n / 2][n % 2] = packed[j * APART + n * 32];
  for (int i = thread; i < 2 * (kPlace + kOwn) / 4; i += kThreads) reinterpret_cast<uint32_t*>(near)[i] = 0;
  if (thread == 0)
    for (int i = 0; i < 2; i++) {
      start_arrival(arrival(i));
      expect(arrival(i), bytes);
    }
  meet_cluster();
}

// A sequence at a step, which are counted from the last one.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
template <bool MASKED>
__device__ __forceinline__ Place ClusterBackward<Cell, T, U, CHUNKS, HALVES>::find(int step, int col) const {
  const int b = row_0 + col, s = int(a.T) - 1 - step;
  const bool there = col < live && s >= 0;
  if (MASKED && there) return place(a, s, d, b);
  return {(d ? step : s) * B + b, there, there, false};
}

// acc [tile, .] = the gradients of the gates of 8 sequences, at `from`, times R.
template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterBackward<Cell, T, U, CHUNKS, HALVES>::multiply(
    float (&acc)[kTiles1][4], const char* from) const {
  constexpr int DEPTH = kPieces < 4 ? kPieces : 4;
#pragma unroll
  for (int i = 0; i < kTiles1 * 4; i++) acc[i / 4][i % 4] = 0.0f;
  uint4 b[DEPTH];
#pragma unroll
  for (int j = 0; j < DEPTH; j++) b[j] = load_shared(from + j * kPieceBytes);
#pragma unroll
  for (int j = 0; j < kPieces; j++) {
    const uint4 part = b[j % DEPTH];
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int n = 0; n < kTiles1; n++)
        T::add(acc[n], true, held[j][n][step], step ? part.z : part.x, step ? part.w : part.y);
    if (j + DEPTH < kPieces) b[j % DEPTH] = load_shared(from + (j + DEPTH) * kPieceBytes);
  }
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
template <bool TALL, bool MASKED>
__device__ __forceinline__ void ClusterBackward<Cell, T, U, CHUNKS, HALVES>::steps() {
  constexpr int OUT = TALL ? 2 : 1;
  auto col = [&](int i) { return first_col + 8 * i; };
  constexpr int BYTES = T::kBytes;
  const int last = int(a.T), gate_bytes = H * BYTES, ahead = int(a.ahead);
  const int64_t rows_0 = d * a.N;
  const Column gates_at(a.gates, rows_0 * SAVED * H + unit, SAVED * H, BYTES);
  const Column dg_at(a.dg, rows_0 * GRADS * H + unit, GRADS * H, BYTES);
  const Column dy_at(a.dy, d * H + unit, a.D * H, BYTES), y_at(a.y, d * H + unit, a.D * H, BYTES);
  const Column h_at(a.h_before, rows_0 * H + unit, H, BYTES), c_at(a.c_before, rows_0 * H + unit, H, 4);
  const Column dseq_at(a.dseq, rows_0 * H + unit, H, 4), seq_at(a.seq, rows_0 * H + unit, H, 4);
  // Of this lane: what it adds, where it puts its gates' gradients, what it multiplies, what it sends.
  const char* sent =
      near + warp / 4 * kTile + half * 512 + (warp % 4 * 8 + thread % 8) * 16 + thread % 32 / 8 * 4;
  char* put = near + 2 * kPlace + first_col * kRow + unit_of_block * BYTES;
  const char* from = near + 2 * kPlace + (8 * half + r) * kRow + q * 16;
  char* to = near + int(blockIdx.y) * kSub * kTile + half * 512 + (q * 8 + r) * 16;
  pin(sent), pin(put), pin(from), pin(to);

  float dh[OUT] = {}, dc[OUT] = {};  // the gradients of h past R, and of c
  Step now[OUT];
  auto look = [&](Step& step, int i, int number) {
    const Place at = step.at = find<MASKED>(number, col(i));
    const int row = at.row, s = last - 1 - number;
    const bool live = at.on && has;
    const char* const gates = gates_at.at(row);
#pragma unroll
    for (int g = 0; g < SAVED; g++) step.saved[g] = read_word<T>(beyond(gates, gate_bytes, g), live);
    step.dy = read_word<T>(dy_at.at(row), a.dy && live);
    // What the first step reads is no row: that is looked at when it is needed.
    const int back = d ? B : -B;  // from a row to that of the step before, where all sequences run
    const bool before = live && s > 0;
    step.h_before = 0, step.c_before = 0, step.c_new = 0, step.dc_seq = 0;
    if constexpr (Cell::kReadsH) {
      if (MASKED && a.h_before)
        step.h_before = read_word<T>(h_at.at(row), live);
      else
        step.h_before = read_word<T>(y_at.at(row + back), before);
    }
    if constexpr (STATES == 2) {
      if (MASKED && a.c_before)
        step.c_before = read<Float32>(c_at.at(row), live);
      else
        step.c_before = read<Float32>(seq_at.at(row + back), before);
      step.c_new = read<Float32>(seq_at.at(row), live);
      step.dc_seq = read<Float32>(dseq_at.at(row), a.dseq && live);
    }
  };
  // Into the cache: a lane for the 16 units that its warp has of a sequence.
  auto bring = [&](int number, int i) {
    const Place at = find<MASKED>(number, col(i));
    if (!at.on || !has || unit_of_block % 16) return;
#pragma unroll
    for (int g = 0; g < SAVED; g++) load_ahead(beyond(gates_at.at(at.row), gate_bytes, g));
    if (a.dy) load_ahead(dy_at.at(at.row));
    if (STATES == 2) {
      load_ahead(seq_at.at(at.row));
      if (unit + 8 < H) load_ahead(seq_at.at(at.row) + 8 * 4);
    }
  };
#pragma unroll
  for (int i = 0; i < OUT; i++) {
    const int64_t index = (d * a.B + row_0 + col(i)) * a.H + unit;
    const bool there = has && col(i) < live;
    dh[i] = T::load(read<T>(a.h_start, index, there && a.h_start));
    if (STATES == 2) dc[i] = T::load(read<T>(a.c_start, index, there && a.c_start));
    look(now[i], i, 0);
  }

  bool cut[OUT] = {};  // whether the step after zeroed its state
  auto one = [&](int step, auto parity) {
    constexpr int slot = decltype(parity)::value;
    if (step > 0) {
      await(arrival(slot), (step - 1) / 2 & 1, int(a.patience));
#pragma unroll
      for (int i = 0; i < OUT; i++) {
        float found[4] = {};
#pragma unroll
        for (int n = 0; n < kSenders; n++)
          found[n % 4] += load_shared_float(sent + slot * kPlace + n * kSub * kTile + i * 512);
        dh[i] += found[0] + found[1] + (found[2] + found[3]);
        if (cut[i]) dh[i] = 0.0f;
      }
    }
    if (step == last) return;
    Vec<float, GRADS> dg[OUT];
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const Place& at = now[i].at;
      Vec<float, SAVED> gates;
      Vec<float, STATES> before, after, d_after, d_before;
#pragma unroll
      for (int g = 0; g < SAVED; g++) gates[g] = T::load(Bits(now[i].saved[g]));
      before[0] = T::load(Bits(now[i].h_before)), after[0] = 0.0f;
      d_after[0] = at.on ? dh[i] + T::load(Bits(now[i].dy)) : 0.0f;
      if constexpr (STATES == 2) {
        before[1] = bits_float(now[i].c_before), after[1] = bits_float(now[i].c_new);
        d_after[1] = (at.on ? dc[i] : 0.0f) + bits_float(now[i].dc_seq);
      }
      if (step == last - 1 && has && at.on) {
        const int64_t first = (d * a.B + row_0 + col(i)) * a.H + unit;
        if (Cell::kReadsH && !(MASKED && a.h_before)) before[0] = T::load(as<Bits>(a.h_first)[first]);
        if (STATES == 2 && !(MASKED && a.c_before)) before[1] = T::load(as<Bits>(a.c_first)[first]);
      }
      Cell::backward(gates, before, after, d_after, dg[i], d_before);
#pragma unroll
      for (int g = 0; g < GRADS; g++) dg[i][g] = has && at.on ? dg[i][g] : 0.0f;
#pragma unroll
      for (int g = 0; g < G; g++)
        if (col(i) < live)
          *reinterpret_cast<Bits*>(put + slot * kOwn + i * 8 * kRow + g * U * BYTES) =
              T::store(dg[i][hidden_grad<Cell>(g)]);
      if (at.on) {
        dh[i] = d_before[0];
        if constexpr (STATES == 2) dc[i] = at.cut ? 0.0f : d_before[1];
      }
      cut[i] = at.cut;
    }
    meet_some(1 + half, kGroup);
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      float acc[kTiles1][4];
      multiply(acc, from + slot * kOwn + i * 8 * kRow);
#pragma unroll
      for (int n = 0; n < kTiles1; n++) {
        const int tile = warp * kTiles1 + n, peer = tile / kSub;
        const float (&c)[4] = acc[n];
        push(to + (slot ^ 1) * kPlace + tile % kSub * kTile + i * 512,
             {float_bits(c[0]), float_bits(c[1]), float_bits(c[2]), float_bits(c[3])}, arrival(slot ^ 1),
             peer, peer < peers && 2 * q + 8 * (half + i) < live);
      }
    }
    if (thread == 0 && step > 0) expect(arrival(slot), bytes);  // next time
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const Place& at = now[i].at;
      if (has && at.here) {
#pragma unroll
        for (int g = 0; g < GRADS; g++) write<T>(beyond(dg_at.at(at.row), gate_bytes, g), dg[i][g]);
      }
      look(now[i], i, step + 1);
      if (ahead) bring(step + ahead, i);
    }
  };
  for (int step = 0; step <= last; step += 2) {
    one(step, Number<0>{});
    if (step < last) one(step + 1, Number<1>{});
  }
#pragma unroll
  for (int i = 0; i < OUT; i++) {
    if (!has || col(i) >= live) continue;
    const int64_t index = (d * a.B + row_0 + col(i)) * a.H + unit;
    write<T>(a.h_left, index, dh[i]);
    if (STATES == 2) write<T>(a.c_left, index, dc[i]);
  }
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
__device__ __forceinline__ void ClusterBackward<Cell, T, U, CHUNKS, HALVES>::all_steps() {
  if (8 * half >= live) return;
  if constexpr (kTall) {
    if (live > 8) return masked ? steps<true, true>() : steps<true, false>();
  }
  masked ? steps<false, true>() : steps<false, false>();
}

template <class Cell, class T, int U, int CHUNKS, int HALVES>
__global__ void __launch_bounds__(8 * U * HALVES, 1) scan_cluster_backward(const __grid_constant__ Args a) {
  if constexpr (!kClusters)
    give_up();
  else
    ClusterBackward<Cell, T, U, CHUNKS, HALVES>(a).run();
}

}  // namespace fastrnn::cuda
