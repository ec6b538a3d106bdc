// The backward kernel, last step first: see forward.h, whose blocks and waiting it shares. A block owns U
// columns of h, which are units but for a projection. What blocks tell each other are the gradients of the
// gates' recurrent parts; a step finishes the gradient of its h by their product with the block's columns of
// R.
//
// Stages of a step: all; or with two, that of n, then those of r and z (GruResetBefore), or the gradient of
// what the projection made, then the cell.
#pragma once

#include "../cells/registry.h"
#include "exchange.h"

namespace fastrnn::cuda {

template <class Cell>
__device__ __forceinline__ constexpr int hidden_grad(int gate) {
  constexpr int last = Cell::kGates - 1;
  constexpr int a = Cell::kHiddenGrad[0], b = Cell::kHiddenGrad[last < 1 ? last : 1],
                c = Cell::kHiddenGrad[last < 2 ? last : 2], d = Cell::kHiddenGrad[last < 3 ? last : 3];
  return gate == 0 ? a : gate == 1 ? b : gate == 2 ? c : d;
}

template <class Cell, class T, int U, int WK, bool PROJECTED>
struct Backward {
  static constexpr bool kMid = Cell::kStages == 2, kTwo = kMid || PROJECTED;
  using S = Shape<U, WK, 1>;
  static constexpr int kColumns1 = U / 8, kColumns2 = U / 8;
  static constexpr int kTiles1 = U / 8 / S::kWn, kTiles2 = kTiles1;
  // A thread has 255; the more outputs it has, the more it keeps for them.
  static constexpr int kMost = (S::kOutputs == 1   ? 168
                                : S::kOutputs == 2 ? 140
                                                   : 64) -
                               (kTwo ? 40 : 0) - (T::kBytes == 4 ? 24 : 0);
  static constexpr Registers kRegisters1 = share_registers(kTiles1, kTiles1, kTwo, S::kOutputs, kMost);
  static constexpr Registers kRegisters2 = share_registers(kTiles2, kTiles1, kTwo, S::kOutputs, kMost);

  static __device__ __forceinline__ void run(const Args& a);
};

template <class Cell, class T, int U, int WK, bool PROJECTED>
__device__ __forceinline__ void Backward<Cell, T, U, WK, PROJECTED>::run(const Args& a) {
  using Bits = typename T::Bits;
  constexpr bool ALONE = S::kAlone;
  constexpr int OUT = S::kOutputs, G = Cell::kGates, STATES = Cell::kStates;
  constexpr int SAVED = Cell::kSaved, GRADS = Cell::kGrads;
  FASTRNN_SHARED(shared);
  const Where<U> w(a);
  const int wk = threadIdx.x / 32 % WK, wn = threadIdx.x / 32 / WK;
  const int tiles = int((a.B + kRows - 1) / kRows), own = (tiles + int(a.grid_x) - 1) / int(a.grid_x);
  float* const sums = reinterpret_cast<float*>(shared);
  float* const kept = sums + S::kSums;  // [tiles, gradients of h past R and of c, outputs]
  char* const alone = reinterpret_cast<char*>(kept + S::kKept * own);
  uint4* const resident = shared + fixed_bytes<S>(a, T::kBytes, own) / 16;
  const int pieces_1 = int(a.stride_1 * T::kBytes / kPieceBytes);
  const int pieces_2 = int(a.stride_2 * T::kBytes / kPieceBytes);

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

  const int H = int(a.H), D_P = int(a.D * a.P);
  const bool has = w.works && w.unit < w.HH, has_k = w.works && w.unit < w.K;
  const int unit = w.head * w.HH + w.unit, column = w.head * w.K + w.unit;
  const int gate_width = (w.HH + 7) / 8 * 8;  // from gate to gate in an exchange
  const bool exists = w.works && w.unit < gate_width, exists_k = w.works && w.unit < a.used_2;

  start<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
  if constexpr (ALONE) {
    for (int64_t i = threadIdx.x; i < kRows * (2 * a.stride_1 + a.stride_2) * T::kBytes / 4; i += kThreads)
      reinterpret_cast<uint32_t*>(alone)[i] = 0;
    __syncthreads();
  }

  for (int64_t step = a.begin; step < a.end; step++) {
    const int64_t s = a.T - 1 - step;
    const bool ends = step == a.T;  // a step more, for the product alone
    const int64_t from = slot_of(a, step), next = slot_of(a, step + 1), middle = ALONE ? 0 : from;
    for (int tile = 0; tile < own; tile++) {
      const int row_0 = (int(blockIdx.x) + tile * int(a.grid_x)) * kRows;
      if (row_0 >= a.B) break;
      // The block's next tile, or its first one of the next step.
      const int row_then = row_0 + int(a.grid_x) * kRows;
      const bool more = tile + 1 < own && row_then < a.B;
      const Rows then{more ? from : next, more ? row_then : int(blockIdx.x) * kRows};
      const bool ahead = !kTwo && !ALONE && own > 1 && (more || step + 1 < a.end);
      float* const state = kept + tile * S::kKept + int(threadIdx.x);
      Place at[OUT] = {};
      bool cut_after[OUT] = {};
      int rows[OUT] = {};
      Bits saved[OUT][SAVED], dy[OUT], h_before[OUT];
      uint32_t dc_seq[OUT], c_before[OUT], c_new[OUT];
      float dh[OUT] = {};
      auto look = [&]() {
        if (!w.works) return;
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const int b = row_0 + w.row(i);
          if (!ends) at[i] = place(a, s, w.d, b);
          cut_after[i] = a.flags && step > 0 && place(a, s + 1, w.d, b).cut;
          rows[i] = w.d * int(a.N) + at[i].row;
          const bool live = at[i].on && has;
          const int64_t of_gates = wide(rows[i], SAVED * H) + unit, of_state = wide(rows[i], H) + unit;
#pragma unroll
          for (int g = 0; g < SAVED; g++) saved[i][g] = read<T>(a.gates, of_gates + g * H, live);
          dy[i] = read<T>(a.dy, wide(at[i].row, D_P) + w.d * int(a.P) + column, a.dy && at[i].on && has_k);
          // From a row to that of the step before, where all sequences run.
          const int back = w.d ? int(a.B) : -int(a.B);
          h_before[i] = 0, c_before[i] = 0, c_new[i] = 0, dc_seq[i] = 0;
          if constexpr (STATES == 1 && G > 1) {  // else the cell reads no h
            if (a.h_before)
              h_before[i] = read<T>(a.h_before, of_state, live);
            else if (s > 0)
              h_before[i] = read<T>(a.y, wide(at[i].row + back, D_P) + w.d * int(a.P) + unit, live);
            else
              h_before[i] = read<T>(a.h_first, wide(w.d * int(a.B) + b, int(a.P)) + unit, live);
          }
          if constexpr (STATES == 2) {
            if (a.c_before)
              c_before[i] = read<Float32>(a.c_before, of_state, live);
            else if (s > 0)
              c_before[i] = read<Float32>(a.seq, of_state + wide(back, H), live);
            else
              c_before[i] = float_bits(T::load(read<T>(a.c_first, wide(w.d * int(a.B) + b, H) + unit, live)));
            c_new[i] = read<Float32>(a.seq, of_state, live);
            dc_seq[i] = read<Float32>(a.dseq, of_state, a.dseq && live);
          }
        }
      };
      // Gradients of gates' recurrent parts, gate by gate in the exchange.
      auto tell = [&](const Exchange<T, ALONE>& exchange, int64_t slot, int i, int gate, float value,
                      bool there) {
        const int b = row_0 + w.row(i);
        publish<T, ALONE>(exchange.slot(slot) + wide(ALONE ? w.row(i) : b, exchange.row) +
                              (gate * gate_width + w.unit) * T::kBytes,
                          value, there && (b < a.B || ALONE));
      };
      auto store = [&](int i, int gate, float value) {
        if (has && at[i].here) write<T>(a.dg, wide(rows[i], GRADS * H) + gate * H + unit, value);
      };
      // Of the cell: the gradients of all gates, told and stored.
      auto whole = [&]() {
        if constexpr (!kMid) {
          Vec<float, Cell::kGrads> dg[OUT];
          Vec<float, STATES> d_before[OUT];
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            float* const carry = state + i * kThreads;
            Vec<float, Cell::kSaved> gates;
            Vec<float, STATES> before, after, d_after;
#pragma unroll
            for (int g = 0; g < SAVED; g++) gates[g] = T::load(saved[i][g]);
            before[0] = T::load(h_before[i]), after[0] = 0.0f, d_after[0] = dh[i];
            if constexpr (STATES == 2) {
              before[1] = bits_float(c_before[i]), after[1] = bits_float(c_new[i]);
              d_after[1] = (at[i].on ? carry[kRows * U] : 0.0f) + bits_float(dc_seq[i]);
            }
            Cell::backward(gates, before, after, d_after, dg[i], d_before[i]);
#pragma unroll
            for (int g = 0; g < GRADS; g++) dg[i][g] = has && at[i].on ? dg[i][g] : 0.0f;
          }
#pragma unroll
          for (int i = 0; i < OUT; i++)
#pragma unroll
            for (int g = 0; g < G; g++) tell(ex1, next, i, g, dg[i][hidden_grad<Cell>(g)], exists);
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            float* const carry = state + i * kThreads;
#pragma unroll
            for (int g = 0; g < GRADS; g++) store(i, g, dg[i][g]);
            if (!PROJECTED && at[i].on) carry[0] = d_before[i][0];
            if constexpr (STATES == 2) {
              if (at[i].on) carry[kRows * U] = at[i].cut ? 0.0f : d_before[i][1];
            }
          }
        }
      };

      if (a.first < 2) {
        float found[OUT][1] = {};
        if (step > 0)
          product<S, 1, U, WK>(found, first, ex1, Rows{from, row_0}, ahead ? &then : nullptr, a,
                               a.mode == kGrid && step > a.begin, pieces_1, w, sums, look);
        else
          look();
        if (w.works) {
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            float* const carry = state + i * kThreads;
            const float all = cut_after[i] ? 0.0f : carry[0] + found[i][0];
            dh[i] = at[i].on ? all + T::load(dy[i]) : 0.0f;
            // What passes a sequence that does not run here.
            if constexpr (PROJECTED) {
              carry[0] = at[i].on ? 0.0f : all;
              if (!ends) {
                tell(ex2, middle, i, 0, has_k ? dh[i] : 0.0f, exists_k);
                if (has_k && at[i].here) write<T>(a.dmid, wide(rows[i], int(a.P)) + column, dh[i]);
              }
            } else if constexpr (kMid) {
              carry[0] = at[i].on ? dh[i] : all;  // for the second stage
              if (!ends) {
                Vec<float, 3> gates{{T::load(saved[i][0]), T::load(saved[i][1]), T::load(saved[i][2])}};
                Vec<float, 1> none{{0.0f}}, d_after{{dh[i]}}, dn, rest;
                Cell::backward(gates, none, none, d_after, dn, rest);
                const float value = has && at[i].on ? dn[0] : 0.0f;
                tell(ex2, middle, i, 0, value, exists);
                store(i, 2, value);
              }
            } else {
              carry[0] = all;
            }
          }
          if constexpr (!kTwo) {
            if (!ends) whole();
          }
        }
        if constexpr (ALONE) __syncthreads();
      }
      if constexpr (kTwo) {
        if (a.last < 2 || ends) continue;
        float through[OUT][1];
        product<S, 1, U, WK>(through, second, ex2, Rows{middle, row_0}, nullptr, a, a.mode == kGrid, pieces_2,
                             w, sums, [&]() {
                               if (a.first == 2) look();
                             });
        if (w.works) {
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            if constexpr (kMid) {
              float* const carry = state + i * kThreads;
              const bool live = has && at[i].on;
              const float d_now = at[i].on ? carry[0] : 0.0f;
              Vec<float, 3> gates{{T::load(saved[i][0]), T::load(saved[i][1]), T::load(saved[i][2])}};
              Vec<float, 1> before{{T::load(h_before[i])}}, d_after{{d_now}}, dn, rest;
              Vec<float, 2> d_rz;
              float mid;
              Cell::backward(gates, before, before, d_after, dn, rest);
              Cell::backward_first(gates, before, through[i][0], d_now, d_rz, rest, mid);
#pragma unroll
              for (int g = 0; g < 2; g++) tell(ex1, next, i, g, live ? d_rz[g] : 0.0f, exists);
#pragma unroll
              for (int g = 0; g < 2; g++) store(i, g, live ? d_rz[g] : 0.0f);
              if (at[i].on) carry[0] = rest[0];
            } else {
              dh[i] = at[i].on ? through[i][0] : 0.0f;
            }
          }
          if constexpr (PROJECTED) whole();
        }
        if constexpr (ALONE) __syncthreads();
      }
    }
  }
  leave<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
}

template <class Cell, class T, int U, int WK, bool PROJECTED>
__global__ void __launch_bounds__(kThreads, 1) scan_backward(const __grid_constant__ Args a) {
  Backward<Cell, T, U, WK, PROJECTED>::run(a);
}

}  // namespace fastrnn::cuda
