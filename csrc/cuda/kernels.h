// From what a launch asks for to the kernel that does it.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastrnn::cuda {

struct Kernel {
  void (*function)(Args) = nullptr;
  int64_t (*fixed)(const Args&, int64_t tiles) = nullptr;  // fixed_bytes
  int parts = 0, gates = 0;                                // of k; of the cell
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

template <class Cell, class T, bool BACKWARD, bool PROJECTED>
Kernel of_units([[maybe_unused]] const Args& a) {
#ifdef FASTRNN_UNITS  // a test compiles these alone
  if (a.mode == kCluster) return kernel_of<Cell, T, BACKWARD, FASTRNN_UNITS, Via::kCluster, PROJECTED>();
  return kernel_of<Cell, T, BACKWARD, FASTRNN_UNITS, Via::kCache, PROJECTED>();
#else
  const bool cluster = a.mode == kCluster;
  if (a.mode == kBlock)
    return a.units == 64 ? kernel_of<Cell, T, BACKWARD, 64, Via::kAlone, PROJECTED>() : Kernel{};
  switch (a.units) {
    case 16:
      return cluster ? kernel_of<Cell, T, BACKWARD, 16, Via::kCluster, PROJECTED>()
                     : kernel_of<Cell, T, BACKWARD, 16, Via::kCache, PROJECTED>();
#ifndef FASTRNN_FEW_KERNELS
    case 32:
      return cluster ? kernel_of<Cell, T, BACKWARD, 32, Via::kCluster, PROJECTED>()
                     : kernel_of<Cell, T, BACKWARD, 32, Via::kCache, PROJECTED>();
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
