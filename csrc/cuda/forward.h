// The forward kernel: all that a layer's recurrence does between x W^T and y, for blocks that wait for each
// other in any of the MODEs. A block owns U units of a group, and the tiles of 16 sequences blockIdx.x,
// blockIdx.x + gridDim.x ...; its slice of R stays where it is for all steps.
//
// Stages of a step: the cell; or with two, r and z, then n (GruResetBefore), or the cell, then the
// projection.
#pragma once

#include "../cells/registry.h"
#include "exchange.h"

namespace fastrnn::cuda {

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
struct Forward {
  static constexpr bool kMid = Cell::kStages == 2, kTwo = kMid || PROJECTED;
  static constexpr int kGates = Cell::kGates, kFirst = Cell::kStageGates[0];  // gates of the first stage
  static constexpr int kColumns1 = (kFirst * U + 15) / 16, kColumns2 = (U + 15) / 16;  // tiles
  // From the cache, each part of the columns would read h once more.
  static constexpr int kWn = VIA == Via::kCache ? 1
                                                : parts_of_columns(kColumns1, kTwo ? kColumns2 : kColumns1,
                                                                   VIA == Via::kAlone ? 8 : U / 8);
  using S = Shape<U, kWn, kFirst, VIA>;
  static constexpr bool kAdds = Cell::kSums;  // so that both biases are one
  static_assert(!kMid || (kGates == 3 && kFirst == 2), "the two stages below are of r and z, and of n");
  static constexpr int kTiles1 = kColumns1 / kWn, kTiles2 = kTwo ? kColumns2 / kWn : 1;
  // A thread has 255; the more outputs it has, the more it keeps for them.
  static constexpr int kMost = (S::kOutputs == 1   ? 160
                                : S::kOutputs == 2 ? 150
                                                   : 80) -
                               (kTwo ? 40 : 0) - (T::kBytes == 4 ? 24 : 0);
  static constexpr Registers kRegisters1 =
      share_registers(kTiles1, kTiles1, kTwo, S::kOutputs, kMost, S::kNear);
  static constexpr Registers kRegisters2 =
      share_registers(kTiles2, kTiles1, kTwo, S::kOutputs, kMost, S::kNear);

  static __device__ __forceinline__ void run(const Args& a);
};

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
__device__ __forceinline__ void Forward<Cell, T, U, VIA, PROJECTED>::run(const Args& a) {
  using Bits = typename T::Bits;
  constexpr bool NEAR = S::kNear;
  constexpr int WK = S::kParts;
  constexpr int OUT = S::kOutputs, G = kGates, STATES = Cell::kStates;
  constexpr int SAVED = Cell::kSaved;
  FASTRNN_SHARED(shared);
  const Where<U> w(a);
  const int wk = threadIdx.x / 32 % WK, wn = threadIdx.x / 32 / WK;
  const int tiles = (w.B + w.rows - 1) / w.rows, own = NEAR ? 1 : (tiles + int(a.grid_x) - 1) / int(a.grid_x);
  float* const sums = reinterpret_cast<float*>(shared);
  float* const kept = sums + S::kSums;  // [tiles, h and c, outputs]
  char* const near = reinterpret_cast<char*>(kept + S::kKept * own);
  uint64_t* const arrivals =
      reinterpret_cast<uint64_t*>(shared + fixed_bytes<S>(a, T::kBytes, own) / 16) - kArrivals / 8;
  uint4* const resident = shared + fixed_bytes<S>(a, T::kBytes, own) / 16;
  const int pieces_1 = int(a.stride_1 * T::kBytes / kPieceBytes);
  const int pieces_2 = int(a.stride_2 * T::kBytes / kPieceBytes);

  // Pieces of the weights [groups, tiles of units, pieces, columns, lane].
  const int64_t block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  Product<T, kTiles1, S::kParts, kRegisters1.depth, kRegisters1.held, NEAR> first;
  Product<T, kTiles2, S::kParts, kRegisters2.depth, kRegisters2.held, NEAR> second;
  if (a.first < 2)
    first.prepare(as<uint4>(a.weights_1) + block * pieces_1 * kColumns1 * 64, kColumns1, pieces_1, wk,
                  wn * kTiles1, a.in_registers, resident, int(a.shared_1));
  if (kTwo && a.last == 2)
    second.prepare(as<uint4>(a.weights_2) + block * pieces_2 * kColumns2 * 64, kColumns2, pieces_2, wk,
                   wn * kTiles2, a.in_registers, resident + a.shared_1 * kWarps * kTiles1 * 64,
                   int(a.shared_2));
  const int left = w.B - w.tile(0, a), live = left < w.rows ? left : w.rows;  // sequences of the first tile
  // What is projected goes to those alone whose columns of h are made of it.
  const int peers = int(a.grid_y), owners = PROJECTED ? w.owners() : peers;
  const Exchange<T, VIA> ex1(a, a.exchange_1, a.stride_1, near, arrivals, live, a.used_1, peers);
  const Exchange<T, VIA> ex2(a, a.exchange_2, a.stride_2, near + 2 * kRows * ex1.row, arrivals + 2, live,
                             a.used_2, owners);

  const int H = int(a.H), rows_0 = int(w.d * a.rows - (w.d ? a.base_1 : a.base_0));
  const bool has = w.unit < w.HH;  // a unit; a column of h, which a projection has fewer of
  const bool has_k = w.unit < w.K;
  const int unit = w.head * w.HH + w.unit, column = w.head * w.K + w.unit;
  // Columns that the exchanges have.
  const bool exists = w.unit < a.used_1, exists_2 = w.unit < a.used_2;
  float bias_x[G], bias_h[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const int64_t ih = w.d ? a.b_ih_1 : a.b_ih_0, hh = w.d ? a.b_hh_1 : a.b_hh_0;
    bias_x[g] = T::load(read<T>(ih, g * a.H + unit, has && ih));
    bias_h[g] = T::load(read<T>(hh, g * a.H + unit, has && hh));
    if (kAdds) bias_x[g] += bias_h[g], bias_h[g] = 0.0f;
  }

  start<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
  auto told = [&](int b) { return b < w.B || VIA == Via::kAlone; };
  if constexpr (NEAR) {
    begin_near(ex1, ex2, near);
    // The first h, zeroed where the first step does so.
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const int b = w.sequence(w.tile(0, a), i);
      const float h = !place(a, a.begin, w.d, b).cut ? kept[w.output(i)] : 0.0f;
      ex1.tell(slot_of<NEAR>(a, a.begin), w.row(i), w.unit, h, exists && told(b));
    }
    if constexpr (VIA == Via::kAlone) __syncthreads();
  }

  // Of this thread's outputs the columns of what is read and written.
  constexpr int BYTES = T::kBytes;
  const Column gates_at(a.gates, wide(rows_0, SAVED * H) + unit, SAVED * H, BYTES);
  const Column y_at(a.y, w.d * a.P + (PROJECTED ? column : unit), a.D * a.P, BYTES);
  const Column seq_at(a.seq, w.d * a.N * H + unit, H, 4);
  const Column mid_at(a.mid, wide(rows_0, H) + unit, H, BYTES);
  const int gate_bytes = H * BYTES;
  // h and c of a block's only tile are in registers.
  float h_kept[NEAR ? OUT : 1], c_kept[NEAR ? OUT : 1];
  if constexpr (NEAR) {
#pragma unroll
    for (int i = 0; i < OUT; i++)
      h_kept[i] = kept[w.output(i)], c_kept[i] = STATES == 2 ? kept[w.output(i) + kRows * U] : 0.0f;
  }

  const int begin = int(a.begin), last_step = w.T - 1;
  int end = int(a.end);
  pin(end);
  for (int s = begin; s < end; s++) {
    const int from = slot_of<NEAR>(a, s), next = slot_of<NEAR>(a, s + 1), middle = NEAR ? 0 : from;
    for (int tile = 0; tile < own; tile++) {
      const int row_0 = w.tile(tile, a);
      if (row_0 >= w.B) break;
      // The block's next tile, or its first one of the next step.
      const int row_then = w.tile(tile + 1, a);
      const bool more = tile + 1 < own && row_then < w.B;
      const Rows then{more ? from : next, more ? row_then : w.tile(0, a)};
      const bool ahead = !kTwo && !NEAR && own > 1 && (more || s + 1 < end);
      auto h_of = [&](int i) -> float& {
        if constexpr (NEAR)
          return h_kept[i];
        else
          return kept[tile * S::kKept + w.output(i)];
      };
      auto c_of = [&](int i) -> float& {
        if constexpr (NEAR)
          return c_kept[i];
        else
          return kept[tile * S::kKept + w.output(i) + kRows * U];
      };
      Place at[OUT] = {};
      bool cut_next[OUT] = {};
      Bits x[OUT][G];
      float r_z[OUT][2] = {};
      auto look = [&]() {
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const int b = w.sequence(row_0, i);
          at[i] = place(a, w, s, b);
          cut_next[i] = w.masked && s < last_step && place(a, s + 1, w.d, b).cut;
          const char* const gates = gates_at.at(at[i].row);
#pragma unroll
          for (int g = 0; g < G; g++) x[i][g] = read<T>(gates + g * gate_bytes, at[i].on && has);
        }
      };
      // h: told to the others, then kept and shown.
      auto tell = [&](int i, float h_new, bool there) {
        const int b = w.sequence(row_0, i);
        const float h = at[i].on ? h_new : h_of(i);
        ex1.tell(next, NEAR ? w.row(i) : b, w.unit, there && !cut_next[i] ? h : 0.0f,
                 exists && told(b) && !(VIA == Via::kCluster && s + 1 == end));
        h_of(i) = h;
      };
      auto show = [&](int i, float h_new, bool there) {
        if (there && at[i].here) write<T>(y_at.at(at[i].row), at[i].on ? h_new : 0.0f);
      };
      auto tell_middle = [&](int i, float value) {
        const int b = w.sequence(row_0, i);
        ex2.tell(middle, NEAR ? w.row(i) : b, w.unit, has && at[i].on ? value : 0.0f, exists_2 && told(b));
      };

      if (a.first < 2) {
        float gh[OUT][kFirst];
        product<S, kFirst, U>(gh, first, ex1, Rows{from, row_0, (s - begin) / 2}, ahead ? &then : nullptr, a,
                              a.mode == kGrid && s > begin, pieces_1, w, sums, look);
        Vec<float, STATES> after[OUT];
        Vec<float, Cell::kSaved> saved[OUT];
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          Vec<float, STATES> before;
          before[0] = at[i].cut ? 0.0f : h_of(i);
          if constexpr (STATES == 2) before[1] = at[i].cut ? 0.0f : c_of(i);
          if constexpr (kMid) {
            Vec<float, 2> gx{{T::load(x[i][0]) + bias_x[0], T::load(x[i][1]) + bias_x[1]}};
            Vec<float, 2> g2{{gh[i][0] + bias_h[0], gh[i][1] + bias_h[1]}}, found;
            float mid;
            Cell::forward_first(gx, g2, before, mid, found);
            after[i][0] = mid, r_z[i][0] = found[0], r_z[i][1] = found[1];
          } else {
            Vec<float, G> gx, g_h;
#pragma unroll
            for (int g = 0; g < G; g++)
              gx[g] = T::load(x[i][g]) + bias_x[g], g_h[g] = kAdds ? gh[i][g] : gh[i][g] + bias_h[g];
            Cell::forward(gx, g_h, before, after[i], saved[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          if constexpr (kTwo)
            tell_middle(i, after[i][0]);
          else
            tell(i, after[i][0], has);
        }
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const bool live = has && at[i].on;
          if constexpr (kMid) {
            if (live && (a.save || a.last == 1)) {  // or the second stage's launch needs them
              write<T>(gates_at.at(at[i].row), r_z[i][0]);
              write<T>(gates_at.at(at[i].row) + gate_bytes, r_z[i][1]);
            }
          } else {
            if constexpr (!PROJECTED) show(i, after[i][0], has);
            if (live && a.save) {
#pragma unroll
              for (int g = 0; g < SAVED; g++) write<T>(gates_at.at(at[i].row) + g * gate_bytes, saved[i][g]);
              if constexpr (PROJECTED) write<T>(mid_at.at(at[i].row), after[i][0]);
            }
            if constexpr (STATES == 2) {
              if (at[i].on) c_of(i) = after[i][1];
              if (a.seq && has && at[i].here)
                write_float(seq_at.at(at[i].row), at[i].on ? after[i][1] : 0.0f);
            }
          }
        }
        if constexpr (VIA == Via::kAlone) __syncthreads();
      }
      if constexpr (kTwo) {
        if (a.last < 2) continue;
        float found[OUT][1] = {};
        auto late = [&]() {
          if (a.first == 2) look();
        };
        if (!PROJECTED || w.owns())
          product<S, 1, U>(found, second, ex2, Rows{middle, row_0, s - begin}, nullptr, a, a.mode == kGrid,
                           pieces_2, w, sums, late);
        else
          late();
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          if constexpr (kMid) {
            const bool live = has && at[i].on;
            Vec<float, 1> gx{{T::load(x[i][2]) + bias_x[2]}}, g1{{found[i][0] + bias_h[2]}}, before, after,
                saved;
            Vec<float, 2> first_found{{r_z[i][0], r_z[i][1]}};
            // A launch of this stage alone reads what the first one left.
            if (a.first == 2)
              first_found = {{0.0f, T::load(read<T>(gates_at.at(at[i].row) + gate_bytes, live))}};
            before[0] = at[i].cut ? 0.0f : h_of(i);
            Cell::forward(gx, g1, before, first_found, after, saved);
            tell(i, after[0], has);
            show(i, after[0], has);
            if (live && a.save) write<T>(gates_at.at(at[i].row) + 2 * gate_bytes, saved[0]);
          } else {
            tell(i, found[i][0], has_k);
            show(i, found[i][0], has_k);
          }
        }
        if constexpr (VIA == Via::kAlone) __syncthreads();
      }
    }
  }
  if constexpr (NEAR) {
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      kept[w.output(i)] = h_kept[i];
      if constexpr (STATES == 2) kept[w.output(i) + kRows * U] = c_kept[i];
    }
  }
  if constexpr (VIA == Via::kCluster) meet_cluster();  // a peer may still push
  leave<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
}

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
__global__ void __launch_bounds__(kThreads, 1) scan_forward(const __grid_constant__ Args a) {
  if constexpr (VIA == Via::kCluster && !kClusters)
    give_up();
  else
    Forward<Cell, T, U, VIA, PROJECTED>::run(a);
}

}  // namespace fastrnn::cuda
