// From what a launch asks for to the kernel that does it.
#pragma once

#include "backward.h"
#include "cluster_backward.h"
#include "cluster_forward.h"
#include "forward.h"
#include "prepare.h"

namespace fastrnn::cuda {

struct Kernel {
  void (*function)(Args) = nullptr;
  int64_t (*fixed)(const Args&, int64_t tiles) = nullptr;  // fixed_bytes
  int threads = kThreads, parts = 0, gates = 0;            // parts of k; gates of the cell
  int64_t stride_1 = 0;                                    // the first stage's k, where that is the kernel's
  Order order = Order::kRows;
  int tiles_1 = 0, held_1 = 0, tiles_2 = 0, held_2 = 0;  // a warp's column tiles, and its pieces in registers
  int columns_1 = 0, columns_2 = 0;                      // tiles of 16 of the block
};

template <class K>
Kernel describe(void (*function)(Args), int parts, int columns_1, int columns_2) {
  Kernel kernel;
  kernel.function = function, kernel.parts = parts;
  kernel.tiles_1 = K::kTiles1, kernel.held_1 = K::kRegisters1.held, kernel.columns_1 = columns_1;
  if (K::kTwo) kernel.tiles_2 = K::kTiles2, kernel.held_2 = K::kRegisters2.held, kernel.columns_2 = columns_2;
  return kernel;
}

template <class Cell, class T, bool BACKWARD, int U, Via VIA, bool PROJECTED>
Kernel kernel_of() {
  Kernel kernel;
  if constexpr (BACKWARD) {
    using K = Backward<Cell, T, U, VIA, PROJECTED>;
    kernel = describe<K>(scan_backward<Cell, T, U, VIA, PROJECTED>, K::S::kParts, K::kColumns1, K::kColumns2);
    kernel.order = Order::kColumns;
    kernel.fixed = [](const Args& a, int64_t tiles) {
      return fixed_bytes<typename K::S>(a, T::kBytes, tiles);
    };
  } else {
    using K = Forward<Cell, T, U, VIA, PROJECTED>;
    kernel = describe<K>(scan_forward<Cell, T, U, VIA, PROJECTED>, K::S::kParts, K::kColumns1, K::kColumns2);
    kernel.fixed = [](const Args& a, int64_t tiles) {
      return fixed_bytes<typename K::S>(a, T::kBytes, tiles);
    };
  }
  kernel.gates = Cell::kGates;
  return kernel;
}

// Of a cluster's kernels for cells of one stage.
template <class K>
Kernel describe_cluster(void (*function)(Args), Order order) {
  Kernel kernel;
  kernel.function = function, kernel.order = order;
  kernel.threads = K::kThreads, kernel.parts = K::kParts, kernel.gates = K::G, kernel.stride_1 = K::kStride1;
  kernel.tiles_1 = K::kTiles1, kernel.held_1 = K::kHeld, kernel.columns_1 = K::kColumns1;
  kernel.fixed = [](const Args&, int64_t) { return int64_t(K::kFixed); };
  return kernel;
}
template <class Cell, class T, bool BACKWARD, int U, int CHUNKS, int HALVES>
Kernel of_cluster() {
  if constexpr (BACKWARD)
    return describe_cluster<ClusterBackward<Cell, T, U, CHUNKS, HALVES>>(
        scan_cluster_backward<Cell, T, U, CHUNKS, HALVES>, Order::kOwn);
  else
    return describe_cluster<ClusterForward<Cell, T, U, CHUNKS, HALVES>>(
        scan_cluster_forward<Cell, T, U, CHUNKS, HALVES>, Order::kEights);
}

template <class Cell, class T, bool BACKWARD, int U, bool PROJECTED>
Kernel of_mode(const Args& a) {
  if (a.mode != kCluster) return kernel_of<Cell, T, BACKWARD, U, Via::kCache, PROJECTED>();
  if constexpr (PROJECTED || Cell::kStages == 2 || T::kBytes > 2) {
    return kernel_of<Cell, T, BACKWARD, U, Via::kCluster, PROJECTED>();
  } else {
    // As many columns of h as a cluster has at most, or half as many, or three quarters.
    constexpr int MOST = kMostPeers * U / 128, FEW = U > 16 ? MOST * 3 / 4 : MOST / 2;
    const bool few = a.grid_y * U <= FEW * 128;
    if (U > 16 || a.tile_rows <= 8)  // else a thread has enough registers for all
      return few ? of_cluster<Cell, T, BACKWARD, U, FEW, 1>() : of_cluster<Cell, T, BACKWARD, U, MOST, 1>();
    if constexpr (U == 16)
      return few ? of_cluster<Cell, T, BACKWARD, U, FEW, 2>() : of_cluster<Cell, T, BACKWARD, U, MOST, 2>();
  }
}

template <class Cell, class T, bool BACKWARD, bool PROJECTED>
Kernel of_units([[maybe_unused]] const Args& a) {
#ifdef FASTRNN_UNITS  // a test compiles these alone
  return of_mode<Cell, T, BACKWARD, FASTRNN_UNITS, PROJECTED>(a);
#else
  if (a.mode == kBlock)
    return a.units == 64 ? kernel_of<Cell, T, BACKWARD, 64, Via::kAlone, PROJECTED>() : Kernel{};
  switch (a.units) {
    case 16:
      return of_mode<Cell, T, BACKWARD, 16, PROJECTED>(a);
#ifndef FASTRNN_FEW_KERNELS
    case 32:
      return of_mode<Cell, T, BACKWARD, 32, PROJECTED>(a);
#endif
  }
  return {};
#endif
}

// Without a function where there is none.
template <class T, bool BACKWARD>
Kernel find(const Args& a) {
  int64_t index = 0;
#define FASTRNN_CASE(Cell)                                                         \
  if (index++ == a.cell) {                                                         \
    if (!a.projected) return of_units<Cell, T, BACKWARD, false>(a);                \
    if constexpr (Cell::kStates == 2) return of_units<Cell, T, BACKWARD, true>(a); \
  }
  FASTRNN_CELLS(FASTRNN_CASE)
#undef FASTRNN_CASE
  return {};
}

Kernel forward_float32(const Args&);
Kernel forward_bfloat16(const Args&);
Kernel forward_float16(const Args&);
Kernel backward_float32(const Args&);
Kernel backward_bfloat16(const Args&);
Kernel backward_float16(const Args&);

}  // namespace fastrnn::cuda
