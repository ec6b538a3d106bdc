// What one step of one direction needs to know, shared by the forward and the backward scan.
#pragma once

#include "params.h"
#include "product.h"

namespace fastrnn::FASTRNN_ISA {

using cpu::Border;
using cpu::Direction;
using cpu::Scan;
using cpu::Share;

// A step's rows, and which of them the state enters or leaves uncut.
struct Step {
  int64_t t;
  int64_t first;        // packed row of the step's first sequence
  int64_t active;       // its sequences
  const uint8_t* keep;  // of the step's own rows; null: no resets
};

template <class E, class A>
FASTRNN_HD Step step_at(const Scan<E, A>& p, const Direction<E, A>& d, int64_t t) {
  if (t < 0 || t >= p.rows.T) return {t, 0, 0, nullptr};
  const int64_t first = p.rows.offset[t];
  return {t, first, p.rows.active[t], d.keep ? d.keep + first : nullptr};
}

FASTRNN_HD bool kept(const Step& s, int64_t i) { return !s.keep || i >= s.active || s.keep[i]; }

template <class E>
FASTRNN_HD Simd<E> if_kept(bool keep, const Simd<E>& x) {
  return keep ? x : Simd<E>(0);
}

template <class E>
FASTRNN_HD Simd<E> load(const Border<E>& b, int64_t row, int64_t unit, int lanes) {
  const int64_t at = row * b.ld + unit;
  if constexpr (sizeof(E) == sizeof(float)) {
    if (b.bf16) return load_bf16(static_cast<const uint16_t*>(b.data) + at, lanes);
  }
  return Simd<E>::load(static_cast<const E*>(b.data) + at, lanes);
}

// Returns what was stored: under bfloat16 the recurrence goes on with the rounded value, as the next call
// would.
template <class E>
FASTRNN_HD Simd<E> store(const Border<E>& b, int64_t row, int64_t unit, int lanes, const Simd<E>& x) {
  const int64_t at = row * b.ld + unit;
  if constexpr (sizeof(E) == sizeof(float)) {
    if (b.bf16) return store_bf16(x, static_cast<uint16_t*>(b.data) + at, lanes);
  }
  x.store(static_cast<E*>(b.data) + at, lanes);
  return x;
}

// Rows that are multiplied. Of E whole vectors, as no product reads beyond a row's end; products of bfloat16
// read on to a multiple of 32, so that what is there stays zero, and stores stop at `lanes`.
template <class E>
FASTRNN_HD Simd<E> load_row(const E* p) {
  return Simd<E>::load(p);
}
FASTRNN_HD Simd<float> load_row(const cpu::Bf16* p) { return load_bf16(&p->bits, Simd<float>::W); }
template <class E>
FASTRNN_HD void store_row(const Simd<E>& x, E* p, int) {
  x.store(p);
}
FASTRNN_HD void store_row(const Simd<float>& x, cpu::Bf16* p, int lanes) { store_bf16(x, &p->bits, lanes); }
// Where another gate's part of the row follows.
template <class E>
FASTRNN_HD void store_part(const Simd<E>& x, E* p, int lanes) {
  x.store(p, lanes);
}
FASTRNN_HD void store_part(const Simd<float>& x, cpu::Bf16* p, int lanes) { store_row(x, p, lanes); }

// Columns of a panel.
template <class E, class A>
inline constexpr int64_t kPanel = cpu::kDepth<A> > 1 ? cpu::kDepth<A> : Simd<E>::W;

template <class E>
FASTRNN_HD void my_blocks(const Share& share, int64_t units, int64_t& block0, int64_t& block1) {
  const int64_t blocks = (units + Simd<E>::W - 1) / Simd<E>::W;
  block0 = blocks * share.part / share.parts;
  block1 = blocks * (share.part + 1) / share.parts;
}

FASTRNN_HD int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
FASTRNN_HD int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

FASTRNN_HD void end_phase(const Share& share) {
  if (share.parts > 1) cpu::meet(share.places, share.part, share.parts);
}

// Asks at once for the few rows that other members have just written: one after the other, as a product meets
// them, it would wait for each line from another core's cache.
template <class A>
FASTRNN_HD void fetch_rows(const Share& share, int64_t row0, int64_t row1, const A* rows, int64_t ld,
                           int64_t K) {
  constexpr int64_t kLine = 64 / sizeof(A), kMost = 8192 / sizeof(A), kMostRows = 4;
  if (share.parts == 1 || row1 - row0 > kMostRows || (row1 - row0) * K > kMost) return;
  for (int64_t r = row0; r < row1; ++r) {
    for (int64_t k = 0; k < K; k += kLine) __builtin_prefetch(rows + r * ld + k);
  }
}

template <class Cell>
constexpr int last_stage_gates() {
  return Cell::kStageGates[Cell::kStages - 1];
}

}  // namespace fastrnn::FASTRNN_ISA
