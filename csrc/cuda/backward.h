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

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
struct Backward {
  static constexpr bool kMid = Cell::kStages == 2, kTwo = kMid || PROJECTED;
  static constexpr int kColumns1 = (U + 15) / 16, kColumns2 = kColumns1;  // tiles
  static constexpr int kWn = VIA == Via::kAlone ? parts_of_columns(kColumns1, kColumns2, 8) : 1;
  using S = Shape<U, kWn, 1, VIA>;
  static constexpr int kTiles1 = kColumns1 / kWn, kTiles2 = kTiles1;
  // A thread has 255; the more outputs it has, the more it keeps for them.
  static constexpr int kMost = (S::kOutputs == 1   ? 168
                                : S::kOutputs == 2 ? 140
                                                   : 64) -
                               (kTwo ? 40 : 0) - (T::kBytes == 4 ? 24 : 0);
  static constexpr Registers kRegisters1 =
      share_registers(kTiles1, kTiles1, kTwo, S::kOutputs, kMost, S::kNear);
  static constexpr Registers kRegisters2 =
      share_registers(kTiles2, kTiles1, kTwo, S::kOutputs, kMost, S::kNear);

  static __device__ __forceinline__ void run(const Args& a);
};

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
__device__ __forceinline__ void Backward<Cell, T, U, VIA, PROJECTED>::run(const Args& a) {
  using Bits = typename T::Bits;
  constexpr bool NEAR = S::kNear;
  constexpr int WK = S::kParts;
  constexpr int OUT = S::kOutputs, G = Cell::kGates, STATES = Cell::kStates;
  constexpr int SAVED = Cell::kSaved, GRADS = Cell::kGrads;
  FASTRNN_SHARED(shared);
  const Where<U> w(a);
  const int wk = threadIdx.x / 32 % WK, wn = threadIdx.x / 32 / WK;
  const int tiles = (w.B + w.rows - 1) / w.rows, own = NEAR ? 1 : (tiles + int(a.grid_x) - 1) / int(a.grid_x);
  float* const sums = reinterpret_cast<float*>(shared);
  float* const kept = sums + S::kSums;  // [tiles, gradients of h past R and of c, outputs]
  char* const near = reinterpret_cast<char*>(kept + S::kKept * own);
  uint64_t* const arrivals =
      reinterpret_cast<uint64_t*>(shared + fixed_bytes<S>(a, T::kBytes, own) / 16) - kArrivals / 8;
  uint4* const resident = shared + fixed_bytes<S>(a, T::kBytes, own) / 16;
  const int pieces_1 = int(a.stride_1 * T::kBytes / kPieceBytes);
  const int pieces_2 = int(a.stride_2 * T::kBytes / kPieceBytes);

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
  // The gradients of gates go to those alone who own columns of h.
  const int peers = int(a.grid_y), owners = PROJECTED ? w.owners() : peers;
  const Exchange<T, VIA> ex1(a, a.exchange_1, a.stride_1, near, arrivals, live, a.used_1, owners);
  const Exchange<T, VIA> ex2(a, a.exchange_2, a.stride_2, near + 2 * kRows * ex1.row, arrivals + 2, live,
                             a.used_2, peers);

  const int H = int(a.H);
  const bool has = w.unit < w.HH, has_k = w.unit < w.K;
  const int unit = w.head * w.HH + w.unit, column = w.head * w.K + w.unit;
  const int gate_width = (w.HH + 7) / 8 * 8;  // from gate to gate in an exchange
  const bool exists = w.unit < gate_width, exists_k = w.unit < a.used_2;

  start<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
  auto told = [&](int b) { return b < w.B || VIA == Via::kAlone; };
  if constexpr (NEAR) begin_near(ex1, ex2, near);

  // Of this thread's outputs the columns of what is read and written.
  constexpr int BYTES = T::kBytes;
  const int64_t rows_0 = w.d * a.N;
  const Column gates_at(a.gates, rows_0 * SAVED * H + unit, SAVED * H, BYTES);
  const Column dg_at(a.dg, rows_0 * GRADS * H + unit, GRADS * H, BYTES);
  const Column dy_at(a.dy, w.d * a.P + column, a.D * a.P, BYTES);
  const Column dmid_at(a.dmid, rows_0 * a.P + column, a.P, BYTES);
  const Column dseq_at(a.dseq, rows_0 * H + unit, H, 4), seq_at(a.seq, rows_0 * H + unit, H, 4);
  const int gate_bytes = H * BYTES;

  // The gradients of h past R and of c, of a block's only tile in registers.
  float dh_kept[NEAR ? OUT : 1], dc_kept[NEAR ? OUT : 1];
  if constexpr (NEAR) {
#pragma unroll
    for (int i = 0; i < OUT; i++)
      dh_kept[i] = kept[w.output(i)], dc_kept[i] = STATES == 2 ? kept[w.output(i) + kRows * U] : 0.0f;
  }

  const int steps = w.T;
  int end = int(a.end);
  pin(end);
  for (int step = int(a.begin); step < end; step++) {
    const int s = steps - 1 - step;
    const bool ends = step == steps;  // a step more, for the product alone
    const int from = slot_of<NEAR>(a, step), next = slot_of<NEAR>(a, step + 1), middle = NEAR ? 0 : from;
    for (int tile = 0; tile < own; tile++) {
      const int row_0 = w.tile(tile, a);
      if (row_0 >= w.B) break;
      // The block's next tile, or its first one of the next step.
      const int row_then = w.tile(tile + 1, a);
      const bool more = tile + 1 < own && row_then < w.B;
      const Rows then{more ? from : next, more ? row_then : w.tile(0, a)};
      const bool ahead = !kTwo && !NEAR && own > 1 && (more || step + 1 < end);
      auto dh_past = [&](int i) -> float& {
        if constexpr (NEAR)
          return dh_kept[i];
        else
          return kept[tile * S::kKept + w.output(i)];
      };
      auto dc_past = [&](int i) -> float& {
        if constexpr (NEAR)
          return dc_kept[i];
        else
          return kept[tile * S::kKept + w.output(i) + kRows * U];
      };
      Place at[OUT] = {};
      bool cut_after[OUT] = {};
      Bits saved[OUT][SAVED], dy[OUT], h_before[OUT];
      uint32_t dc_seq[OUT], c_before[OUT], c_new[OUT];
      float dh[OUT] = {};
      auto look = [&]() {
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const int b = w.sequence(row_0, i);
          if (!ends) at[i] = place(a, w, s, b);
          cut_after[i] = w.masked && step > 0 && place(a, s + 1, w.d, b).cut;
          const bool live = at[i].on && has;
          const int row = at[i].row;
          const char* const gates = gates_at.at(row);
#pragma unroll
          for (int g = 0; g < SAVED; g++) saved[i][g] = read<T>(gates + g * gate_bytes, live);
          dy[i] = read<T>(dy_at.at(row), a.dy && at[i].on && has_k);
          // From a row to that of the step before, where all sequences run.
          const int back = w.d ? int(a.B) : -int(a.B);
          h_before[i] = 0, c_before[i] = 0, c_new[i] = 0, dc_seq[i] = 0;
          if constexpr (Cell::kReadsH) {
            if (a.h_before)
              h_before[i] = read<T>(a.h_before, wide(int(rows_0) + row, H) + unit, live);
            else if (s > 0)
              h_before[i] = read<T>(a.y, wide(row + back, int(a.D * a.P)) + w.d * int(a.P) + unit, live);
            else
              h_before[i] = read<T>(a.h_first, wide(w.d * int(a.B) + b, int(a.P)) + unit, live);
          }
          if constexpr (STATES == 2) {
            if (a.c_before)
              c_before[i] = read<Float32>(a.c_before, wide(int(rows_0) + row, H) + unit, live);
            else if (s > 0)
              c_before[i] = read<Float32>(seq_at.at(row + back), live);
            else
              c_before[i] = float_bits(T::load(read<T>(a.c_first, wide(w.d * int(a.B) + b, H) + unit, live)));
            c_new[i] = read<Float32>(seq_at.at(row), live);
            dc_seq[i] = read<Float32>(dseq_at.at(row), a.dseq && live);
          }
        }
      };
      // Gradients of gates' recurrent parts, gate by gate in the exchange.
      auto tell = [&](const Exchange<T, VIA>& exchange, int slot, int i, int gate, float value, bool there) {
        const int b = w.sequence(row_0, i);
        exchange.tell(slot, NEAR ? w.row(i) : b, gate * gate_width + w.unit, value, there && told(b));
      };
      auto store = [&](int i, int gate, float value) {
        if (has && at[i].here) write<T>(dg_at.at(at[i].row) + gate * gate_bytes, value);
      };
      // Of the cell: the gradients of all gates, told and stored.
      auto whole = [&]() {
        if constexpr (!kMid) {
          Vec<float, Cell::kGrads> dg[OUT];
          Vec<float, STATES> d_before[OUT];
#pragma unroll
          for (int i = 0; i < OUT; i++) {
            Vec<float, Cell::kSaved> gates;
            Vec<float, STATES> before, after, d_after;
#pragma unroll
            for (int g = 0; g < SAVED; g++) gates[g] = T::load(saved[i][g]);
            before[0] = T::load(h_before[i]), after[0] = 0.0f, d_after[0] = dh[i];
            if constexpr (STATES == 2) {
              before[1] = bits_float(c_before[i]), after[1] = bits_float(c_new[i]);
              d_after[1] = (at[i].on ? dc_past(i) : 0.0f) + bits_float(dc_seq[i]);
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
#pragma unroll
            for (int g = 0; g < GRADS; g++) store(i, g, dg[i][g]);
            if (!PROJECTED && at[i].on) dh_past(i) = d_before[i][0];
            if constexpr (STATES == 2) {
              if (at[i].on) dc_past(i) = at[i].cut ? 0.0f : d_before[i][1];
            }
          }
        }
      };

      if (a.first < 2) {
        float found[OUT][1] = {};
        if (step > 0 && (!PROJECTED || w.owns()))
          product<S, 1, U>(found, first, ex1, Rows{from, row_0, (step - 1) / 2}, ahead ? &then : nullptr, a,
                           a.mode == kGrid && step > int(a.begin), pieces_1, w, sums, look);
        else
          look();
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          const float all = cut_after[i] ? 0.0f : dh_past(i) + found[i][0];
          dh[i] = at[i].on ? all + T::load(dy[i]) : 0.0f;
          // What passes a sequence that does not run here.
          if constexpr (PROJECTED) {
            dh_past(i) = at[i].on ? 0.0f : all;
            if (!ends) {
              tell(ex2, middle, i, 0, has_k ? dh[i] : 0.0f, exists_k);
              if (has_k && at[i].here) write<T>(dmid_at.at(at[i].row), dh[i]);
            }
          } else if constexpr (kMid) {
            dh_past(i) = at[i].on ? dh[i] : all;  // for the second stage
            if (!ends) {
              Vec<float, 3> gates{{T::load(saved[i][0]), T::load(saved[i][1]), T::load(saved[i][2])}};
              Vec<float, 1> none{{0.0f}}, d_after{{dh[i]}}, dn, rest;
              Cell::backward(gates, none, none, d_after, dn, rest);
              const float value = has && at[i].on ? dn[0] : 0.0f;
              tell(ex2, middle, i, 0, value, exists);
              store(i, 2, value);
            }
          } else {
            dh_past(i) = all;
          }
        }
        if constexpr (!kTwo) {
          if (!ends) whole();
        }
        if constexpr (VIA == Via::kAlone) __syncthreads();
      }
      if constexpr (kTwo) {
        if (a.last < 2 || ends) continue;
        float through[OUT][1];
        product<S, 1, U>(through, second, ex2, Rows{middle, row_0, step}, nullptr, a, a.mode == kGrid,
                         pieces_2, w, sums, [&]() {
                           if (a.first == 2) look();
                         });
#pragma unroll
        for (int i = 0; i < OUT; i++) {
          if constexpr (kMid) {
            const bool live = has && at[i].on;
            const float d_now = at[i].on ? dh_past(i) : 0.0f;
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
            if (at[i].on) dh_past(i) = rest[0];
          } else {
            dh[i] = at[i].on ? through[i][0] : 0.0f;
          }
        }
        if constexpr (PROJECTED) whole();
        if constexpr (VIA == Via::kAlone) __syncthreads();
      }
    }
  }
  if constexpr (NEAR) {
#pragma unroll
    for (int i = 0; i < OUT; i++) {
      kept[w.output(i)] = dh_kept[i];
      if constexpr (STATES == 2) kept[w.output(i) + kRows * U] = dc_kept[i];
    }
  }
  if constexpr (VIA == Via::kCluster) meet_cluster();  // a peer may still push
  leave<T, STATES>(a, w, kept, own, has, has_k, unit, column, S::kKept, OUT);
}

template <class Cell, class T, int U, Via VIA, bool PROJECTED>
__global__ void __launch_bounds__(kThreads, 1) scan_backward(const __grid_constant__ Args a) {
  if constexpr (VIA == Via::kCluster && !kClusters)
    give_up();
  else
    Backward<Cell, T, U, VIA, PROJECTED>::run(a);
}

}  // namespace fastrnn::cuda
