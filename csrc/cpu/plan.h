// The model of the machine: how the work of a call falls into threads and chunks. docs/cpu.md has its
// reasons.
#pragma once

#include <cstdint>

#include "../scan.h"
#include "params.h"

namespace fastrnn::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of a core's second-level cache, as the system says when first asked; 1 MB where it does not.
int64_t second_level_cache();
// Of the third level, which cores share; 0 where there is none.
int64_t third_level_cache();

// The backward scan's chunk: its gradients of the gates stay in cache for the products after it, and these
// are still large.
int64_t chunk_steps(const LayerArgs& a, int64_t row_bytes);

// Whether x and h of a step enter one product, weight_bytes together, rather than x of many steps one before
// them all: that spares writing and reading gx, but W is read in each step. By sizes alone, whatever the
// threads, since the sums are added up in another order. tiles: by AMX, which multiplies faster than weights
// arrive.
bool joint_product(const LayerArgs& a, int64_t weight_bytes, bool tiles);

// The forward scan's chunk: its rows of x and of gx stay in the second-level cache while W sweeps over them;
// but tiles would wait for W where that is few rows, and take more.
int64_t input_steps(const LayerArgs& a, int64_t columns, size_t element, bool tiles);

// Whether the forward pass writes what it keeps for the backward, `bytes` for each thread, past the caches:
// they would hold no more than its end, and a line written in part is first read.
bool keeps_past_caches(int64_t bytes);

// Threads for products of so many multiplications, which meet but once in a while.
int product_threads(int64_t multiplications);

// How many threads, and how they share out (directions, rows, units). Directions need nothing of each other;
// rows no barrier, but each thread streams the whole of R, which should then fit in its own second-level
// cache, or be met by many rows. (In a call of few steps R is still in the caches of those that packed it, a
// share each: units, then.) Units need a barrier for every phase of a step.
class Plan {
 public:
  struct Split {
    int directions, rows, units;  // parts of each
  };

  // Multiplications of a thread, of a call. One sequence waits for its weights: its own take longer.
  static constexpr int64_t kLeastCall = 100000, kLeastCallOfOne = 45000;

  // step, call: multiplications of one step's recurrent product in one direction, and of all. weight_bytes,
  // of one direction's recurrent weights; blocks, vectors of units.
  Plan(const LayerArgs& a, int64_t step, int64_t call, int64_t weight_bytes, int64_t blocks,
       int64_t least_call = kLeastCall);

  // Layers of a stack side by side, each some steps behind the one below it: `groups` of neighbours, the
  // units of whose layers fall into `units` parts. They meet once in `steps` steps, where the parts of one
  // layer meet in each. groups is 1 where one layer after another is faster.
  struct Wave {
    int groups, units;
    int64_t steps;
  };

  int threads() const { return threads_; }
  Split split(int threads) const;
  // Of a team that may have more members than threads(): these have no direction.
  Share share(const Team& team) const;
  // Of a stack of `layers`, whose first is this one; cached: its input_steps.
  Wave wave(int64_t layers, int64_t cached) const;

 private:
  // The nanoseconds of a step of this layer, or of one above it, whose units fall into so many parts.
  double step_time(int units, bool above) const;

  int64_t D_, T_, B_, I_, P_;
  bool even_;  // the batch: any part of its rows has as many steps as another, or nearly
  int64_t step_, call_, weight_bytes_, blocks_;
  int threads_;
};

}  // namespace fastrnn::cpu
