// What attention on the CPU works on: plain structs of pointers, as params.h has them for the scans; read by
// the kernels of every instruction set, in attend.h and decode.h.
#pragma once

#include "params.h"

namespace fastrnn::cpu {

// One sequence's memory, in rows of scratch: batch first, so that a query walks through memory in order,
// padded with zeros to whole vectors.
template <class E>
struct Memory {
  const E *keys, *values;  // [S][ld_keys], [S][ld_values]; zeros where it may not be attended to
  int64_t ld_keys, ld_values, S, K, V;
  const bool* mask;  // [S]; null: all
  const E* v;        // [padded K] of the additive score; null: dot products
  E scale;
  bool masked = false;  // whether a mask was given, whatever it leaves out
};

// A decoder with input feeding, see decode.h. Rows are t*B + b unless said otherwise; layers count from
// below.
template <class E>
struct Decoder {
  const CellKernels<E>* cell;
  int layers;
  Scan<E>* scan;            // [layers], of one direction each: cells, weights, states and their scratch
  int64_t B, S, K;          // S of the longest memory, K the width of a query
  const Memory<E>* memory;  // [B]
  E* row;                   // [B][ld_row] scratch: of one query's scores, backward of two such rows
  E* out;                   // [N][H] a
  E* weights;               // [B][T][S]
  const E* const* drops;    // [layers - 1] of [N][H], what outputs are multiplied with; null: none
  int64_t ld_row, ld_feed, ld_query;

  // Forward.
  Weight<E> w_feed[2];  // of a_{t-1}, for each stage of the cell
  Weight<E> w_h;        // of h in a
  Weight<E> w_query;    // of h in the query; null: the query is h
  E* const* dropped;    // [layers - 1] of [N][H]
  E *feed[2], *mixed;   // [B][ld_feed]: a in turns, the sums of the values
  E* query;             // [B][ld_query] of the additive score
  E* queries;           // [N][K] the same of all steps, for the backward pass; null: not kept

  // Backward. Panels as gradients.h has them; those "by sequence" have rows b*T + t. Null: what they are for
  // is not needed.
  Weight<E> w_feed_t, w_h_t, w_query_t;
  const Weight<E>* w_below_t;     // [layers] of the input of each layer but the first
  const E *dout, *dweights;       // [N][H], [B][T][S]; null: none
  E *dz[2], *dfeed;               // [B][ld_feed]: of what tanh is taken of, in turns; of the first a
  E* dquery;                      // [B][ld_query] of the additive score
  E *dz_panels, *dquery_panels;   // by sequence; the second of the additive score
  E *ds_panels, *weights_panels;  // [B] of [S/W][T][W]: of the scores, and their softmax
  int64_t panel, sequence_panel;  // rows of a panel; of one sequence's, where that has its own
  E *dkeys, *dv;                  // [B][S][ld_query], [B][ld_query]: sums of the additive score
};

// All queries of one sequence, for the operator `attention`; see attend_rows.h. Rows of a tensor lie ld
// apart.
template <class E>
struct Attend {
  const E *query, *keys, *values;  // [Tq][K], [S][K], [S][V]
  const E* v;                      // as Memory has it
  int64_t Tq, S, K, V;             // S up to the last position that a query may attend to
  int64_t ld_query, ld_keys, ld_values;
  const bool *mask, *any;  // [Tq] rows of ld_mask, and what one of them allows, [S]; null: all
  int64_t ld_mask;
  bool masked;  // as Memory has it
  E scale;
  E *context, *weights, *lse;  // [Tq][V]; [Tq][ld_weights] or null; [Tq], the logarithm of the softmax's sum
  int64_t ld_context, ld_weights;

  // Backward.
  const E *dcontext, *dweights;  // as context and weights; the second may be null
  E *dquery, *dkeys, *dvalues;   // as query, keys and values; null: not needed
  E* dv;                         // [padded K] of the additive score; null: not needed

  bool needs_scores() const { return dquery || dkeys || dv; }  // their gradients
};

// Queries at a time, at most, and the fewest that they are cut to: forward for the sake of threads, backward
// for that of the caches. They share what is packed of the memory, or added to its gradients.
inline constexpr int64_t kMostAttendRows = 128, kLeastAttendRows = 32;

// An instruction set's entry.
template <class E>
struct AttentionKernels {
  void (*decode)(const Decoder<E>&, const Share&);
  void (*decode_backward)(const Decoder<E>&, const Share&);
  // Queries [q0, q1) of a sequence; all of them, backward, by the members that share it. scratch: so many
  // elements as the next two say; the second of this very sequence, as shorter ones may take more.
  void (*attend)(const Attend<E>&, int64_t q0, int64_t q1, E* scratch);
  void (*attend_backward)(const Attend<E>&, const Share&, E* scratch);
  int64_t (*scratch)(const Attend<E>&, int64_t rows);
  int64_t (*backward_scratch)(const Attend<E>&);
};

// Of the instruction set in force.
template <class E>
const AttentionKernels<E>& attention_kernels();

}  // namespace fastrnn::cpu
