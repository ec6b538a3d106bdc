// What a launch is told: one list, from which come the struct that kernels take and the names by which the
// host's Python fills it. Pointers are addresses. Dimensions: T time, B batch, N rows, H units and P width of
// h of a direction, D directions; HH = H / heads and K = P / heads of a group (a direction's head); T of the
// layer's type: elements are of it unless said otherwise.
#pragma once

#include <cstdint>

#define FASTRNN_CUDA_ARGS(X)                                                                              \
  /* Which kernel: index in FASTRNN_CELLS, 0 float32, 1 bfloat16, 2 float16, units of a block, one of */  \
  /* the MODEs below; its grid: batch tiles at once, unit tiles, groups; sequences of a batch tile, at */ \
  /* most 16 and but in a cluster 16. */                                                                  \
  X(cell) X(dtype) X(backward) X(projected) X(units) X(mode) X(grid_x) X(grid_y) X(grid_z) X(tile_rows)    \
  /* Rows [D, rows, .] from base on: gates [., SAVED*H], mid [., H] (what is projected); y [N, D*P], seq */ \
  /* [D, N, H] float32. A 0: there is none. */                                                             \
  X(gates) X(y) X(seq) X(mid) X(base_0) X(base_1) X(rows)                                                  \
  /* [D, B, P], [D, B, H]: the states that the pass starts from (0: zeros) and leaves; between launches */ \
  /* they are kept in float32. Backward their gradients, from the last step to the first. */               \
  X(h_start) X(c_start) X(h_left) X(c_left) X(h_kept) X(c_kept)                                            \
  X(w_hh_0) X(w_hh_1) X(w_hr_0) X(w_hr_1) /* [GATES*H, K], [P, H] */                                       \
  X(b_ih_0) X(b_ih_1) X(b_hh_0) X(b_hh_1) /* [GATES*H] */                                                  \
  /* Backward: dy [N, D*P], dseq [D, N, H] float32; the states before a step [D, N, P] and, float32, */    \
  /* [D, N, H], or where they are 0 what they were before the first step, [D, B, P], [D, B, H]; what */    \
  /* comes out: dg [D, N, GRADS*H], dmid [D, N, P]. */                                                     \
  X(dy) X(dseq) X(h_before) X(c_before) X(h_first) X(c_first) X(dg) X(dmid)                                \
  /* Memory for the weights of each stage as product.h reads them, and for [slots, groups, B, stride], */  \
  /* what blocks tell each other (exchange.h), of which `used` columns exist; origin: the step that */     \
  /* reads the first slot. */                                                                              \
  X(weights_1) X(weights_2) X(exchange_1) X(exchange_2)                                                    \
  X(stride_1) X(stride_2) X(used_1) X(used_2) X(slots) X(origin)                                           \
  /* [T + 1] int64: the row where t begins, of a PackedSequence; [D, T, B] bytes: 1 the sequence runs, 2 */ \
  /* its state is zeroed before. */                                                                        \
  X(offsets) X(flags)                                                                                      \
  X(T) X(B) X(N) X(H) X(P) X(D) X(heads)                                                                   \
  /* Steps begin to end (backward: counted from the last one, with one more for what the first step */     \
  /* leaves to the first h), of stages first to last; the launch is the pass's first, its last; save: the */ \
  /* gates. */                                                                                             \
  X(begin) X(end) X(first) X(last) X(starts) X(leaves) X(save)                                             \
  /* float32: 3xTF32, else TF32. */                                                                        \
  X(exact)                                                                                                 \
  /* Whether a waiting thread looks for all that it needs at once, or for a part; how often at most. */    \
  X(eager) X(patience)                                                                                     \
  /* How many steps before it is needed the backward pass of a cluster has what it reads brought into the */ \
  /* cache; 0: it is there. */                                                                             \
  X(ahead)                                                                                                 \
  /* Of a warp's pieces of a stage's weights: whether the first are kept in registers, and how many then */ \
  /* in shared memory (of a block at most shared_limit bytes; 0: of the device). Filled by the launch. */  \
  X(in_registers) X(shared_limit) X(shared_1) X(shared_2)

namespace fastrnn::cuda {

struct Args {
#define FASTRNN_FIELD(name) int64_t name;
  FASTRNN_CUDA_ARGS(FASTRNN_FIELD)
#undef FASTRNN_FIELD
};

// How blocks wait for each other.
enum Mode : int64_t {
  kStep = 0,     // they do not: a launch each stage of a step
  kGrid = 1,     // through the cache, all of them resident: one launch of many steps
  kBlock = 2,    // through shared memory: a block owns all units of its group
  kCluster = 3,  // through each other's shared memory: a cluster owns all units of its group
};

}  // namespace fastrnn::cuda
