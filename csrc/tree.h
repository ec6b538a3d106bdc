// Forests: the order in which recursive cells visit nodes. Shared by every device.
#pragma once

#include "scan.h"

namespace fastrnn {

// A schedule, LongTensor [5, N + 1], as fastrnn::tree_schedule makes it. State flows along edges, from a
// source to a target; a level's nodes have their sources in levels before it. A *position* is a place in
// `order`.
//   row 0  order   [N]      the nodes, level after level
//   row 1  levels  [L + 1]  where each level begins in order, N after the last; the rest of the row is N
//   row 2  first   [N + 1]  the edges into position p are first[p] .. first[p + 1]
//   row 3  source  [E]      the node that an edge comes from
//   row 4  slot    [E]      which child its child is
struct Schedule {
  Tensor data;  // contiguous
  int64_t N, L, E;
  const int64_t *order, *levels, *first, *source, *slot;
};

// Raises a RuntimeError where an index leads out of bounds, or a source does not stand in a level before its
// target's. slots: the most that a cell knows; 0: any.
Schedule check_schedule(const Tensor& schedule, int64_t slots);

}  // namespace fastrnn
