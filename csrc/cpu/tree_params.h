// What the kernels of recursive cells work on: a plain struct of pointers, filled by tree_forward.cpp and
// tree_backward.cpp. E is float or double. ../tree.h explains the schedule; a node's position is its place in
// it.
//
// H hidden units, A slots with weights of their own (1 where children are summed). Q = 4*H (summed), (3+A)*H
// (N-ary) or H (TreeRNN): the gates' gradients that one edge multiplies with one slot's weights on the way
// back.
#pragma once

#include "params.h"

namespace fastrnn::cpu {

template <class E>
struct Tree {
  int64_t N, I, H, A, Q;
  bool summed;
  const int64_t *order, *first, *source, *slot;  // as in Schedule
  const int64_t* target;                         // [E] the position that an edge leads to
  int64_t at_once;                               // rows that a member's scratch holds

  // Forward, by position. The slots of the edges into it lie in lo .. hi - 1; hi = 0: there are none.
  const int64_t *lo, *hi;  // [N]
  const E* x;              // [N, I] by node; null: none
  Weight<E> w_x;
  const E* bias;  // [gates][ld]
  int64_t ld;     // of rows of H in scratch
  Weight<E> w;    // i, g, o together (TreeRNN: the one gate), K = A*H
  Weight<E> w_f;  // A of them, each of one gate, f_step apart
  int64_t f_step;
  E* gates;             // [rows][gates*H] gx first; then i, f's input part, g, o. By position,
  int64_t gates_first;  // from this one on
  E* forget;            // [N][H], a row for each edge; null: not wanted
  E *h, *c;             // [N, H] by node

  // Backward. `list`: positions, level after level like order, those with as many slots together.
  const int64_t *list, *out_lo, *out_hi;  // [N]; out_lo, out_hi by place in list
  const int64_t *out_first, *out_edge;    // [N + 1], [E]: the edges from a node
  Weight<E> w_back;                       // H units, K = A*Q: by slot the rows i, g, o, f_0, f_1 ...
  const E *dh, *dc;                       // [N, H] by node; null: zeros
  E* dg;                                  // [N][gates*H] by position, in the order of the input's gates
  E* df;                                  // [E][H]
  E* dc_all;                              // [N][H] by position: all of dL/dc
  Weight<E> w_x_back;                     // I units, K = gates*H
  E* dx;                                  // [N, I] by node
};

// A member's memory.
template <class E>
struct TreeScratch {
  E *rows, *sums, *fc;  // [at_once][ld_rows], [at_once][ld], [at_once][ld]
  int64_t ld_rows;
  int64_t* edges;  // [at_once][A]
};

// Rows begin .. end of one level (of list on the way back), vectors of units block0 .. block1.
struct TreePart {
  int64_t begin, end, block0, block1;
  bool backwards;  // sweeps the weights from the last unit
};

// One entry of an instruction set's table.
template <class E>
struct TreeKernels {
  const char* name;
  int gates, states;
  bool summed;
  void (*input)(const Tree<E>&, const TreeScratch<E>&, const TreePart&);  // gx of positions
  void (*forward)(const Tree<E>&, const TreeScratch<E>&, const TreePart&);
  void (*backward)(const Tree<E>&, const TreeScratch<E>&, const TreePart&);
  void (*input_gradient)(const Tree<E>&, const TreePart&);  // dx of positions
};

}  // namespace fastrnn::cpu
