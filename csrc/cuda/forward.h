// The forward kernel: all that a layer's recurrence does between x W^T and y, for blocks that wait for each
// other in any of the MODEs. A block owns U units of a group, and the tiles of 16 sequences blockIdx.x,
// blockIdx.x + gridDim.x ...; its slice of R stays where it is for all steps.
//
// Stages of a step: the cell; or with two, r and z, then n (GruResetBefore), or the cell, then the projection.
#pragma once

#include "../cells/registry.h"
#include "exchange.h"

namespace fastrnn::cuda {

template <class Cell, class T, int U, int WK, bool PROJECTED>
struct Forward {
  static constexpr bool kMid = Cell::kStages == 2, kTwo = kMid || PROJECTED;
  static constexpr int kGates = Cell::kGates, kFirst = Cell::kStageGates[0];  // gates of the first stage
  using S = Shape<U, WK, kFirst, 2>;
  static constexpr int kTiles1 = kFirst * U / 8 / S::kWn, kTiles2 = U / 8 / S::kWn;
  static constexpr int kColumns1 = kFirst * U / 8, kColumns2 = U / 8;

  // A thread has 255; the more outputs it has, the more it keeps for them.
  static constexpr int kMost = (S::kOutputs == 1 ? 160 : S::kOutputs == 2 ? 150 : 112) - (kTwo ? 32 : 0);
  static constexpr Registers kRegisters1 = share_registers(kTiles1, kTiles1, kTwo, S::kOutputs, kMost);
  static constexpr Registers kRegisters2 = share_registers(kTiles2, kTiles1, kTwo, S::kOutputs, kMost);

  static __device__ __forceinline__ void run(const Args& a);
};

template <class Cell, class T, int U, int WK, bool PROJECTED>
__device__ __forceinline__ void Forward<Cell, T, U, WK, PROJECTED>::run(const Args& a) {
  constexpr int OUT = S::kOutputs, G = kGates, SAVED = Cell::kSaved, STATES = Cell::kStates;
  FASTRNN_SHARED(shared);
  const Where<T, U> w(a);
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
  const Exchange<T> ex1(a, a.exchange_1, a.stride_1, alone);
  const Exchange<T> ex2(a, a.exchange_2, a.stride_2, alone + 2 * kRows * a.stride_1 * T::kBytes);

  const bool has = w.works && w.unit < w.HH;  // a unit; a column of h, which a projection has fewer of
  const bool has_k = w.works && w.unit < w.K;
  const int64_t unit = w.head * w.HH + w.unit, column = w.head * w.K + w.unit;
  const int width = PROJECTED ? w.K : w.HH, exists = (width + 7) / 8 * 8, exists_2 = (w.HH + 7) / 8 * 8;
  float bias_x[G], bias_h[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const int64_t ih = w.d ? a.b_ih_1 : a.b_ih_0, hh = w.d ? a.b_hh_1 : a.b_hh_0;
    bias_x[g] = read<T>(ih, g * a.H + unit, has && ih);
    bias_h[g] = read<T>(hh, g * a.H + unit, has && hh);
  }

  for (int i = 0; i < own * OUT; i++) {
    const int tile = i / OUT, b = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows + w.row(i % OUT);
    float* state = kept + tile * S::kKept + w.output(i % OUT);
    if (!w.works) continue;
    const bool there = b < a.B;
    state[0] = there && has_k ? as<float>(a.h_state)[(w.d * a.B + b) * a.P + column] : 0.0f;
    if (STATES == 2)
      state[kRows * U] = there && has ? as<float>(a.c_state)[(w.d * a.B + b) * a.H + unit] : 0.0f;
  }
  if (a.mode == kBlock) {
    // Its first h, zeroed where the first step does so; what no thread writes must be no NaN.
    for (int64_t i = threadIdx.x; i < kRows * (2 * a.stride_1 + a.stride_2) * T::kBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(alone)[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      const Place now = place(a, a.begin, w.d, int(blockIdx.x) * kRows + w.row(i));
      const float h = w.works && !now.cut ? kept[w.output(i)] : 0.0f;
      publish<T>(ex1.slot((a.begin - a.origin) % a.slots) + w.row(i) * ex1.row + w.unit * T::kBytes, h,
                 w.works && w.unit < exists);
    }
    __syncthreads();
  }

  int turn = 0;
  // The sums' next buffer; where there is one alone, or blocks meet here, all threads are done with the last.
  auto fresh = [&]() { return sums + (S::kBuffers ? turn++ % 2 * (S::kSums / 2) : 0); };
  for (int64_t s = a.begin; s < a.end; s++) {
    const int64_t from = (s - a.origin) % a.slots, next = (s + 1 - a.origin) % a.slots;
    const int64_t middle = a.mode == kBlock ? 0 : from;
    for (int tile = 0; tile < own; tile++) {
      const int row_0 = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows;
      if (row_0 >= a.B) break;
      float* const state = kept + tile * S::kKept + int(threadIdx.x);
      Place at[OUT];
      bool cut_next[OUT];
      float x[OUT][G], r_z[OUT][2] = {};
      int local[OUT];
#pragma unroll
      for (int i = 0; i < OUT; i++) {
        const int b = row_0 + w.row(i);
        at[i] = w.works ? place(a, s, w.d, b) : Place{0, false, false, false};
        cut_next[i] = a.flags && w.works && s + 1 < a.T && place(a, s + 1, w.d, b).cut;
        local[i] = int(w.d * a.rows + at[i].row - (w.d ? a.base_1 : a.base_0));
#pragma unroll
        for (int g = 0; g < G; g++)
          x[i][g] = read<T>(a.gates, (int64_t(local[i]) * SAVED + g) * a.H + unit, at[i].on && has) + bias_x[g];
      }
      // Of outputs that run on: h and its image in y.
      auto finish = [&](int i, float h_new, int64_t column, bool there, bool exists) {
        const int b = row_0 + w.row(i);
        float* const h = state + i * kThreads;
        const float kept_h = at[i].on ? h_new : *h;
        if (w.works) *h = kept_h;
        publish<T>(ex1.slot(next) + (a.mode == kBlock ? w.row(i) : b) * ex1.row + w.unit * T::kBytes,
                   there && !cut_next[i] ? kept_h : 0.0f, exists && (b < a.B || a.mode == kBlock));
        if (there && at[i].here) write<T>(a.y, at[i].row * a.D * a.P + w.d * a.P + column, at[i].on ? h_new : 0.0f);
      };
      auto tell_middle = [&](int i, float value) {
        const int b = row_0 + w.row(i);
        publish<T>(ex2.slot(middle) + (a.mode == kBlock ? w.row(i) : b) * ex2.row + w.unit * T::kBytes,
                   has && at[i].on ? value : 0.0f,
                   w.works && w.unit < exists_2 && (b < a.B || a.mode == kBlock));
      };

      if (a.first < 2) {
        float* const sum = fresh();
        product<WK>(first, ex1, from, row_0, a, a.mode == kGrid && s > a.begin, sum, S::kRow);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          if (OUT == 1 && !w.works) break;
          float gh[kFirst];
#pragma unroll
          for (int g = 0; g < kFirst; g++)
            gh[g] = total<WK>(sum, S::kRow, pieces_1, w.row(i), g * U + w.unit - w.unit_0) + bias_h[g];
          float* const h = state + i * kThreads;
          Vec<float, STATES> before, after;
          before[0] = at[i].cut ? 0.0f : *h;
          if constexpr (STATES == 2) before[1] = at[i].cut ? 0.0f : h[kRows * U];
          const bool live = has && at[i].on;
          if constexpr (kMid) {
            Vec<float, 2> gx{{x[i][0], x[i][1]}}, g2{{gh[0], gh[1]}}, saved;
            float mid;
            Cell::forward_first(gx, g2, before, mid, saved);
            r_z[i][0] = saved[0], r_z[i][1] = saved[1];
            tell_middle(i, mid);
            if (live) {
              write<T>(a.gates, int64_t(local[i]) * SAVED * a.H + unit, saved[0]);
              write<T>(a.gates, (int64_t(local[i]) * SAVED + 1) * a.H + unit, saved[1]);
            }
          } else {
            Vec<float, G> gx, g_h;
            Vec<float, SAVED> saved;
#pragma unroll
            for (int g = 0; g < G; g++) gx[g] = x[i][g], g_h[g] = gh[g];
            Cell::forward(gx, g_h, before, after, saved);
            if constexpr (STATES == 2) {
              if (at[i].on && w.works) h[kRows * U] = after[1];
            }
            if constexpr (PROJECTED)
              tell_middle(i, after[0]);
            else
              finish(i, after[0], unit, has, w.works && w.unit < exists);
            if (live && a.save) {
#pragma unroll
              for (int g = 0; g < SAVED; g++) write<T>(a.gates, (int64_t(local[i]) * SAVED + g) * a.H + unit, saved[g]);
              if constexpr (PROJECTED) write<T>(a.mid, local[i] * a.H + unit, after[0]);
            }
            if constexpr (STATES == 2) {
              if (a.seq && has && at[i].here)
                to<float>(a.seq)[(w.d * a.N + at[i].row) * a.H + unit] = at[i].on ? after[1] : 0.0f;
            }
          }
        }
        if (!S::kBuffers || a.mode == kBlock) __syncthreads();
      }
      if constexpr (kTwo) {
        if (a.last < 2) continue;
        float* const sum = fresh();
        product<WK>(second, ex2, middle, row_0, a, a.mode == kGrid, sum, S::kRow);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          if (OUT == 1 && !w.works) break;
          float h_new = total<WK>(sum, S::kRow, pieces_2, w.row(i), w.unit - w.unit_0);
          if constexpr (kMid) {
            const bool live = has && at[i].on;
            Vec<float, 1> gx{{x[i][2]}}, g1{{h_new + bias_h[2]}}, before, after, saved;
            Vec<float, 2> found{{r_z[i][0], r_z[i][1]}};
            // A launch of this stage alone reads what the first one left.
            if (a.first == 2) found = {{0.0f, read<T>(a.gates, (int64_t(local[i]) * SAVED + 1) * a.H + unit, live)}};
            before[0] = at[i].cut ? 0.0f : state[i * kThreads];
            Cell::forward(gx, g1, before, found, after, saved);
            finish(i, after[0], unit, has, w.works && w.unit < exists);
            if (live && a.save) write<T>(a.gates, (int64_t(local[i]) * SAVED + 2) * a.H + unit, saved[0]);
          } else {
            finish(i, h_new, column, has_k, w.works && w.unit < exists);
          }
        }
        if (!S::kBuffers || a.mode == kBlock) __syncthreads();
      }
    }
  }

  for (int i = 0; i < own * OUT; i++) {
    const int tile = i / OUT, b = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows + w.row(i % OUT);
    const float* state = kept + tile * S::kKept + w.output(i % OUT);
    if (!w.works || b >= a.B) continue;
    if (has_k) to<float>(a.h_state)[(w.d * a.B + b) * a.P + column] = state[0];
    if (STATES == 2 && has) to<float>(a.c_state)[(w.d * a.B + b) * a.H + unit] = state[kRows * U];
  }
}

template <class Cell, class T, int U, int WK, bool PROJECTED>
__global__ void __launch_bounds__(kThreads, 1) scan_forward(const __grid_constant__ Args a) {
  Forward<Cell, T, U, WK, PROJECTED>::run(a);
}

}  // namespace fastrnn::cuda
