// What a CPU scan works on: plain structs of pointers, filled by forward_pass.h, layer_backward.cpp and the
// decoder, read by the kernels of every instruction set. E is the type of the arithmetic: float (also for
// bfloat16 tensors) or double. A is the type of what is multiplied, rows and packed weights alike: E, or
// bfloat16 where the instruction set multiplies that.
//
// Rows are *packed*: step t's active sequences stand at rows offset[t] .. offset[t] + active[t]. In a dense
// batch that is t*B .. t*B + B; in a ragged one the sequences are sorted by length, so a step's rows are a
// prefix of the batch. Rows of scratch are padded (ld > H): rows of exactly a power of two fall on the same
// cache sets.
#pragma once

#include <cstdint>

#include "int8.h"
#include "team.h"

namespace fastrnn::cpu {

inline constexpr int kMaxStates = 4;

struct Bf16 {
  uint16_t bits;
};

// What is multiplied is padded with zeros to a multiple of this.
template <class A>
inline constexpr int64_t kDepth = 1;
template <>
inline constexpr int64_t kDepth<Bf16> = 32;

struct Rows {
  int64_t T, B;
  const int64_t* active;   // [T]
  const int64_t* offset;   // [T + 1]
  const int64_t* outside;  // [N] the row of x and y that belongs to a packed row; null: the same
  int64_t at(int64_t row) const { return outside ? outside[row] : row; }
};

// A tensor of E or of bfloat16, rows of ld elements.
template <class E>
struct Border {
  void* data;
  int64_t ld;
  bool bf16;

  Border row(int64_t row) const {
    return {static_cast<char*>(data) + row * ld * (bf16 ? sizeof(Bf16) : sizeof(E)), 0, bf16};
  }
};

// x where its caller has it: its rows, ld apart where all are in order; else row t*B + b of them at t*step +
// b*ld.
template <class E>
struct Input : Border<E> {
  int64_t B, step;  // B = 0: in order

  Border<E> row(int64_t row) const {
    const int64_t at = B ? row / B * step + row % B * this->ld : row * this->ld;
    return {static_cast<char*>(this->data) + at * (this->bf16 ? sizeof(Bf16) : sizeof(E)), 0, this->bf16};
  }
};

// The weight of a product, element (gate g, unit u, k): packed by Kernels::pack where many rows will use it,
// else where torch keeps it.
template <class A>
struct Weight {
  enum Layout {
    kPacked,   // [units/W][K][G][W]; of bfloat16 pairs along k, [units/W][K/2][G][W][2], or, as tiles,
               // [units/W][G][K/32][16][W][2]
    kRows,     // [G][units][K], rows of ld: dot products along k
    kColumns,  // [K][units], rows of ld, G = 1, whole vectors of units
    kInt8      // see int8.h; A is float
  };
  const A* data = nullptr;
  Layout layout = kPacked;
  // kPacked: the K of a block as it lies (of tiles, of a gate's column), 0 where that is the product's;
  // kRows, kColumns: from a row to the next; kInt8: not used.
  int64_t ld = 0;
  const Int8Kernels* int8 = nullptr;  // of kInt8
  explicit operator bool() const { return data; }
};

template <class E, class A = E>
struct Direction {
  bool reverse;
  const uint8_t* keep;  // [N] 0 where a reset cuts the state that enters the step; null: no resets

  Border<E> y;  // [rows][P], this direction's columns

  // Stage s of the cell, then the projection; backward, the transposed products.
  Weight<A> w[2], w_proj;  // w_proj null: no projection

  // Forward.
  Weight<A> w_x[2];  // the input's, of each stage
  A* x_rows;         // [chunk rows][ld_x] the chunk's rows of x; null: x is read where it lies, in order
  int64_t ld_x;
  const E* bx;  // [G][ld_b] input bias, whole vectors; zeros where there is none
  const E* bh;  // [G][ld_b] recurrent bias
  const E* b;   // their sum, where the scan is joint
  int64_t ld_b;
  E* gx;                   // [chunk rows][G][ld_state], a part for each member; null: the scan is joint
  E* save;                 // [N][kSaved*H] what the cell saves; null: not wanted
  bool stream;             // it and seq past the caches; whole lines of them
  E* seq[kMaxStates - 1];  // [N][H] sequences of the states after h; null: not wanted
  E* raw;                  // [N][H] h before the projection; null: not wanted

  // Backward.
  const E* saved;  // [N][kSaved*H]; null: y has what the cell saves
  // The chunk's rows in panels [columns/W][chunk rows][W], of bfloat16 in [columns/32][chunk rows][32].
  const A* h_prev;                // P columns: the h that entered the step
  A* dg;                          // of each of kGrads, H columns
  A* mid_out;                     // H columns: two-stage cells' mid, for the weight gradient
  A* dh_out;                      // P columns: dh of the projected state, for its weight gradient
  Border<E> dy;                   // null data: no gradient reached y
  int64_t dy_first;               // the row of y that it begins with
  const E* dseq[kMaxStates - 1];  // [N][H]; null: none
  const E* s0[kMaxStates - 1];    // [B][ld_state] first states after h

  // Scratch, kept between chunks.
  E* state[kMaxStates];  // forward: state[0] unused, state[s] [B][ld_state]; backward: ds
  A* ring[2];            // forward: h [B][ld_ring]; backward: dgh [B][ld_ring]
  int64_t ld_ring;
  A* last_ring;  // backward: dgh of each row's last step [B][ld_ring]
  A* mid;        // [B][ld_mid]: two-stage values, or h before the projection, or dh of it
  int64_t ld_mid;
  E* dh;  // backward, of two stages: what reached h, for the first [B][ld_state]
  int64_t ld_state;
};

template <class E, class A = E>
struct Scan {
  Rows rows;
  Direction<E, A> dir[2];
  int64_t H, P;    // P: the width of h, = H without projection
  int64_t k0, k1;  // the steps to do, in the order of the scan; what scratch holds goes on from call to call

  // Backward, where they are one chunk.
  int64_t panel_rows;  // of a chunk, at most

  Input<E> x;

  // Forward.
  int64_t I;
  int64_t steps;    // of a chunk
  bool joint;       // one product of x and h, by weights that lie in one: there is no gx
  unsigned sweeps;  // over the weights, before this call: every other one is backwards
};

// Splits (direction, rows, units) over a team: `Plan::share`.
struct Share {
  int dir0, dir1;      // directions of this member
  int64_t row0, row1;  // rows of the batch
  int part, parts;     // part of the units; parts > 1: all of them meet at the end of each phase
  Place* places;       // where
  float* quantized;    // scratch of this member: what its int8 weights meet, by int8_row
};

struct Pack {
  const void* src;
  bool bf16;                                                    // of src; what is packed is A
  int64_t gates, gate_stride, units, unit_stride, K, k_stride;  // strides in elements; one of the two is 1
  // Of the whole, where this is a part of a weight; to_K: a block's rows, where it has more. 0: this is all.
  int64_t to_gates = 0, to_K = 0;
};

// One panel's share of a weight's gradient: out [lanes][columns] = (or +=) the sum over rows of a [rows][W]
// by b, panels [columns/W][rows][W].
template <class E, class A = E>
struct OuterProduct {
  const A *a, *b;   // of bfloat16 b's panels [columns/32][rows/2][2][16][2], as pair_rows leaves them
  int64_t b_panel;  // from one panel of b to the next
  int64_t rows, longest;
  int lanes;
  int64_t columns;
  E* out;
  int64_t ld_out;
  bool add;
};

// out [rows][columns] = (or +=) dg w; dg's panels [gates][units/W][rows][W], w [gates*units][columns].
template <class E, class A = E>
struct InputGradient {
  const A* dg;
  int64_t panel, gates, units;
  Weight<A> w;  // of bfloat16 packed with the gates for G
  int64_t columns;
  Border<E> out;  // its first row
  bool add;
};

template <class E>
struct TreeKernels;  // tree_params.h

// More input of a step: rows [B][ld] of H values, and their weight in the gates of each stage.
template <class E>
struct Feed {
  const Weight<E>* w;
  const E* rows;
  int64_t ld;
};

// One entry of an instruction set's table.
template <class E, class A = E>
struct CellKernels {
  const char* name;
  int gates, states;
  int saved;  // values of a unit and a step kept for the backward pass; 0: y has them
  int grads, stages;
  const int* stage_gates;
  const int* hidden_grad;
  void (*forward)(const Scan<E, A>&, const Share&);
  void (*backward)(const Scan<E, A>&, const Share&);
  void (*finish)(const Scan<E, A>&,
                 const Share&);  // the product that ends the backward scan: ds of the first state
  bool joins;                    // forward takes a joint scan
  // A decoder's, of one direction: step t, with the input's part of the gates of steps [t0, t1) where it is
  // the first of them; backward, step k from the last. Null where A is not E.
  void (*step)(const Scan<E, A>&, const Share&, int64_t t, int64_t t0, int64_t t1, const Feed<E>*) = nullptr;
  void (*step_backward)(const Scan<E, A>&, const Share&, int64_t k) = nullptr;
};

// How a packed weight lies in memory: see Weight::kPacked.
enum class Packing : uint8_t { kSingles, kPairs, kTiles };

template <class E, class A = E>
struct Kernels {
  int width;  // units in a vector
  int panel;  // columns in a panel
  Packing packing;
  int count;
  const CellKernels<E, A>* cells;
  void (*pack)(const Pack&, A* dst, int64_t block0, int64_t block1);
  void (*to_panels)(const Border<E>& row, int64_t columns, A* to, int64_t panel);
  void (*pair_rows)(A* panel, int64_t rows);  // null: an outer product reads them as they are
  void (*outer_product)(const OuterProduct<E, A>&);
  void (*add_rows)(const A* panel, int64_t rows, double* to);
  void (*input_gradient)(const InputGradient<E, A>&, int64_t row0, int64_t row1);
  const TreeKernels<E>* trees;  // up to one without a name; null: E's own kernels have them
};

template <class E>
struct AttentionKernels;  // attention.h

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Int8Kernels int8;
  Kernels<float, Bf16> bf16{};  // of no cells: bfloat16 tensors go to f32
  const AttentionKernels<float>* attention_f32 = nullptr;
  const AttentionKernels<double>* attention_f64 = nullptr;
};

}  // namespace fastrnn::cpu
