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

template <class Cell, class T, int U, int WK, bool PROJECTED>
struct Forward {
  static constexpr bool kMid = Cell::kStages == 2, kTwo = kMid || PROJECTED;
  static constexpr int kGates = Cell::kGates, kFirst = Cell::kStageGates[0];  // gates of the first stage
  using S = Shape<U, WK, kFirst>;
  // The cell adds its gates' two parts; else it keeps a recurrent one for itself.
  static constexpr bool kAdds = Cell::kSaved == kGates;
  static constexpr int kColumns1 = kFirst * U / 8, kColumns2 = U / 8;
  static constexpr int kTiles1 = kColumns1 / S::kWn, kTiles2 = kColumns2 / S::kWn;
  // A thread has 255; the more outputs it has, the more it keeps for them.
  static constexpr int kMost = (S::kOutputs == 1   ? 160
                                : S::kOutputs == 2 ? 150
                                                   : 80) -
                               (kTwo ? 40 : 0) - (T::kBytes == 4 ? 24 : 0);
  static constexpr Registers kRegisters1 = share_registers(kTiles1, kTiles1, kTwo, S::kOutputs, kMost);
  static constexpr Registers kRegisters2 = share_registers(kTiles2, kTiles1, kTwo, S::kOutputs, kMost);

  static __device__ __forceinline__ void run(const Args& a);
};

template <class Cell, class T, int U, int WK, bool PROJECTED>
__device__ __forceinline__ void Forward<Cell, T, U, WK, PROJECTED>::run(const Args& a) {
  using Bits = typename T::Bits;
  constexpr bool ALONE = S::kAlone;
  constexpr int OUT = S::kOutputs, G = kGates, STATES = Cell::kStates;
  constexpr int SAVED = Cell::kSaved;
  FASTRNN_SHARED(shared);
  const Where<U> w(a);
  const int wk = threadIdx.x / 32 % WK, wn = threadIdx.x / 32 / WK;
  const int tiles = int((a.B + kRows - 1) / kRows), own = (tiles + int(a.grid_x) - 1) / int(a.grid_x);
  float* const sums = reinterpret_cast<float*>(shared);
  float* const kept = sums + S::kSums;  // [tiles, h and c, outputs]
  char* const alone = reinterpret_cast<char*>(kept + S::kKept * own);
  uint4* const resident = shared + fixed_bytes<S>(a, T::kBytes, own) / 16;
  const int pieces_1 = int(a.stride_1 * T::kBytes / kPieceBytes);
  const int pieces_2 = int(a.stride_2 * T::kBytes / kPieceBytes);

  // Pieces of the weights [groups, tiles of units, pieces, columns, lane].
  const int64_t block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  Product<T, kTiles1, kRegisters1.depth, kRegisters1.held> first;
  Product<T, kTiles2, kRegisters2.depth, kRegisters2.held> second;
  if (a.first < 2)
    first.prepare(as<uint4>(a.weights_1) + block * pieces_1 * kColumns1 * 32, kColumns1, pieces_1, wk, WK,
                  wn * kTiles1, a.in_registers, resident, int(a.shared_1));
  if (kTwo && a.last == 2)
    second.prepare(as<uint4>(a.weights_2) + block * pieces_2 * kColumns2 * 32, kColumns2, pieces_2, wk, WK,
                   wn * kTiles2, a.in_registers, resident + a.shared_1 * kWarps * kTiles1 * 32,
                   int(a.shared_2));
  const Exchange<T, ALONE> ex1(a, a.exchange_1, a.stride_1, alone);
  const Exchange<T, ALONE> ex2(a, a.exchange_2, a.stride_2, alone + 2 * kRows * a.stride_1 * T::kBytes);

  const int H = int(a.H), D_P = int(a.D * a.P), rows_0 = int(w.d * a.rows - (w.d ? a.base_1 : a.base_0));
  const bool has = w.works && w.unit < w.HH;  // a unit; a column of h, which a projection has fewer of
  const bool has_k = w.works && w.unit < w.K;
  const int unit = w.head * w.HH + w.unit, column = w.head * w.K + w.unit;
  // Columns that the exchanges have.
  const bool exists = w.works && w.unit < a.used_1, exists_2 = w.works && w.unit < a.used_2;
  float bias_x[G], bias_h[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const int64_t ih = w.d ? a.b_ih_1 : a.b_ih_0, hh = w.d ? a.b_hh_1 : a.b_hh_0;
    bias_x[g] = T::load(read<T>(ih, g * a.H + unit, has && ih));
    bias_h[g] = T::load(read<T>(hh, g * a.H + unit, has && hh));
    if (kAdds) bias_x[g] += bias_h[g], bias_h[g] = 0.0f;
  }

  start<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
  if constexpr (ALONE) {
    // Its first h, zeroed where the first step does so; what no thread writes must be no NaN.
    for (int64_t i = threadIdx.x; i < kRows * (2 * a.stride_1 + a.stride_2) * T::kBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(alone)[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const Place now = place(a, a.begin, w.d, int(blockIdx.x) * kRows + w.row(i));
      const float h = w.works && !now.cut ? kept[w.output(i)] : 0.0f;
      publish<T, ALONE>(ex1.slot(slot_of(a, a.begin)) + w.row(i) * ex1.row + w.unit * T::kBytes, h, exists);
    }
    __syncthreads();
  }

  for (int64_t s = a.begin; s < a.end; s++) {
    const int64_t from = slot_of(a, s), next = slot_of(a, s + 1), middle = ALONE ? 0 : from;
    for (int tile = 0; tile < own; tile++) {
      const int row_0 = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows;
      if (row_0 >= a.B) break;
      // The block's next tile, or its first one of the next step.
      const int row_then = row_0 + int(a.grid_x) * kRows;
      const bool more = tile + 1 < own && row_then < a.B;
      const Rows then{more ? from : next, more ? row_then : int(blockIdx.x) * kRows};
      const bool ahead = !kTwo && !ALONE && own > 1 && (more || s + 1 < a.end);
      float* const state = kept + tile * S::kKept + int(threadIdx.x);
      Place at[OUT] = {};
      bool cut_next[OUT] = {};
      Bits x[OUT][G];
      float r_z[OUT][2] = {};
      int64_t of_gates[OUT];
      auto look = [&]() {
        if (!w.works) return;
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const int b = row_0 + w.row(i);
          at[i] = place(a, s, w.d, b);
          cut_next[i] = a.flags && s + 1 < a.T && place(a, s + 1, w.d, b).cut;
          of_gates[i] = wide(rows_0 + at[i].row, SAVED * H) + unit;
#pragma unroll
          for (int g = 0; g < G; g++) x[i][g] = read<T>(a.gates, of_gates[i] + g * H, at[i].on && has);
        }
      };
      // h: told to the others, then kept and shown.
      auto tell = [&](int i, float h_new, bool there) {
        const int b = row_0 + w.row(i);
        const float h = at[i].on ? h_new : state[i * kThreads];
        publish<T, ALONE>(ex1.slot(next) + wide(ALONE ? w.row(i) : b, ex1.row) + w.unit * T::kBytes,
                          there && !cut_next[i] ? h : 0.0f, exists && (b < a.B || ALONE));
        if (w.works) state[i * kThreads] = h;
      };
      auto show = [&](int i, float h_new, int column, bool there) {
        if (there && at[i].here)
          write<T>(a.y, wide(at[i].row, D_P) + w.d * int(a.P) + column, at[i].on ? h_new : 0.0f);
      };
      auto tell_middle = [&](int i, float value) {
        const int b = row_0 + w.row(i);
        publish<T, ALONE>(ex2.slot(middle) + wide(ALONE ? w.row(i) : b, ex2.row) + w.unit * T::kBytes,
                          has && at[i].on ? value : 0.0f, exists_2 && (b < a.B || ALONE));
      };

      if (a.first < 2) {
        float gh[OUT][kFirst];
        product<S, kFirst, U, WK>(gh, first, ex1, Rows{from, row_0}, ahead ? &then : nullptr, a,
                                  a.mode == kGrid && s > a.begin, pieces_1, w, sums, look);
        Vec<float, STATES> after[OUT];
        Vec<float, Cell::kSaved> saved[OUT];
        if (w.works) {
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            float* const h = state + i * kThreads;
            Vec<float, STATES> before;
            before[0] = at[i].cut ? 0.0f : *h;
            if constexpr (STATES == 2) before[1] = at[i].cut ? 0.0f : h[kRows * U];
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
                write<T>(a.gates, of_gates[i], r_z[i][0]);
                write<T>(a.gates, of_gates[i] + H, r_z[i][1]);
              }
            } else {
              if constexpr (!PROJECTED) show(i, after[i][0], unit, has);
              if (live && a.save) {
#pragma unroll
                for (int g = 0; g < SAVED; g++) write<T>(a.gates, of_gates[i] + g * H, saved[i][g]);
                if constexpr (PROJECTED) write<T>(a.mid, wide(rows_0 + at[i].row, H) + unit, after[i][0]);
              }
              if constexpr (STATES == 2) {
                if (at[i].on) state[i * kThreads + kRows * U] = after[i][1];
                if (a.seq && has && at[i].here)
                  to<float>(a.seq)[wide(w.d * int(a.N) + at[i].row, H) + unit] =
                      at[i].on ? after[i][1] : 0.0f;
              }
            }
          }
        }
        if constexpr (ALONE) __syncthreads();
      }
      if constexpr (kTwo) {
        if (a.last < 2) continue;
        float found[OUT][1];
        product<S, 1, U, WK>(found, second, ex2, Rows{middle, row_0}, nullptr, a, a.mode == kGrid, pieces_2,
                             w, sums, [&]() {
                               if (a.first == 2) look();
                             });
        if (w.works) {
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            if constexpr (kMid) {
              const bool live = has && at[i].on;
              Vec<float, 1> gx{{T::load(x[i][2]) + bias_x[2]}}, g1{{found[i][0] + bias_h[2]}}, before, after,
                  saved;
              Vec<float, 2> first_found{{r_z[i][0], r_z[i][1]}};
              // A launch of this stage alone reads what the first one left.
              if (a.first == 2) first_found = {{0.0f, T::load(read<T>(a.gates, of_gates[i] + H, live))}};
              before[0] = at[i].cut ? 0.0f : state[i * kThreads];
              Cell::forward(gx, g1, before, first_found, after, saved);
              tell(i, after[0], has);
              show(i, after[0], unit, has);
              if (live && a.save) write<T>(a.gates, of_gates[i] + 2 * H, saved[0]);
            } else {
              tell(i, found[i][0], has_k);
              show(i, found[i][0], column, has_k);
            }
          }
        }
        if constexpr (ALONE) __syncthreads();
      }
    }
  }
  leave<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
}

template <class Cell, class T, int U, int WK, bool PROJECTED>
__global__ void __launch_bounds__(kThreads, 1) scan_forward(const __grid_constant__ Args a) {
  Forward<Cell, T, U, WK, PROJECTED>::run(a);
}

}  // namespace fastrnn::cuda
