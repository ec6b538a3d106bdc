// What a pass needs before its first step: the weights as product.h reads them, and the place that the first
// step reads.
#pragma once

#include "exchange.h"

namespace fastrnn::cuda {

// A stage's weights: of w [gates * heads * height, width] those of `gates` gates from `first` on, packed
// [groups, tiles of units, pieces, columns, 2, lane, 16 bytes]: the product's columns by 16, and its k.
enum class Order {
  kRows,     // columns: a tile's gates * units rows; k: w's columns
  kEights,   // likewise, of eight units after eight, two gates of each a column
  kColumns,  // columns: a tile's units of w's columns; k: w's rows, each gate's up to a multiple of 8
  kOwn,      // columns: w's columns; k: a tile's gates * units rows
};
struct Weights {
  int64_t w[2], packed;  // of each direction
  int64_t first, gates, heads, height, width;
  int64_t tiles, units, pieces, columns;
  Order order;

  __host__ __device__ int64_t parts(int64_t groups) const { return groups * tiles * pieces * columns * 64; }
};

template <class T>
__device__ __forceinline__ void pack(const Weights& w, int64_t i) {
  using Bits = typename T::Bits;
  constexpr int PART = 16 / T::kBytes;
  const int64_t lane = i % 32, half = i / 32 % 2, column = i / 64 % w.columns;
  const int64_t piece = i / (64 * w.columns) % w.pieces, tile = i / (64 * w.columns * w.pieces) % w.tiles;
  const int64_t group = i / (64 * w.columns * w.pieces * w.tiles), d = group / w.heads,
                head = group % w.heads;
  const int64_t tall = (w.height + 7) / 8 * 8;
  const Bits* from = as<Bits>(w.w[d]);
  alignas(16) Bits part[PART];
#pragma unroll
  for (int e = 0; e < PART; e++) {
    // mma's operand: of columns lane / 4 and the 8th after it, a lower and an upper k.
    constexpr int WORD = PART / 4;
    const int64_t n = column * 16 + lane / 4 + e / WORD % 2 * 8;
    const int64_t k = (piece * 4 + lane % 4) * PART + (half * 2 + e / WORD / 2) * WORD + e % WORD;
    int64_t gate, row, column_of_w;
    bool there = true;
    switch (w.order) {
      case Order::kRows:
        gate = n / w.units, row = tile * w.units + n % w.units, column_of_w = k;
        break;
      case Order::kEights: {
        const int64_t each = (w.gates + 1) / 2;
        gate = column % each * 2 + n % 16 / 8, row = tile * w.units + column / each * 8 + n % 8;
        column_of_w = k;
        break;
      }
      case Order::kColumns:
        gate = k / tall, row = k % tall, column_of_w = tile * w.units + n, there = n < w.units;
        break;
      default:
        gate = k / w.units, row = tile * w.units + k % w.units, column_of_w = n;
    }
    there = there && gate < w.gates && row < w.height && column_of_w < w.width;
    part[e] = there ? from[(((w.first + gate) * w.heads + head) * w.height + row) * w.width + column_of_w]
                    : Bits(0);
  }
  to<uint4>(w.packed)[i] = *reinterpret_cast<const uint4*>(part);
}

// A column of the slot that the first step reads: h, or where that step zeroes it and past its columns 0.
template <class T>
__device__ __forceinline__ void place_h(const Args& a, int64_t i) {
  const int64_t K = a.P / a.heads, column = i % a.stride_1, b = i / a.stride_1 % a.B;
  const int64_t group = i / (a.stride_1 * a.B), d = group / a.heads, head = group % a.heads;
  const int64_t from = (d * a.B + b) * a.P + head * K + column;
  float h = 0.0f;
  if (column < K && !place(a, a.begin, int(d), int(b)).cut) {
    if (!a.starts)
      h = as<float>(a.h_kept)[from];
    else if (a.h_start)
      h = T::load(as<typename T::Bits>(a.h_start)[from]);
  }
  write<T>(a.exchange_1, (slot_of(a, a.begin) * a.D * a.heads * a.B) * a.stride_1 + i, h);
}

template <class T>
__global__ void prepare(const __grid_constant__ Args a, const __grid_constant__ Weights first,
                        const __grid_constant__ Weights second, int64_t parts_1, int64_t parts_2,
                        int64_t places) {
  const int64_t all = parts_1 + parts_2 + places;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all;
       i += int64_t(gridDim.x) * kThreads) {
    if (i < parts_1)
      pack<T>(first, i);
    else if (i < parts_1 + parts_2)
      pack<T>(second, i - parts_1);
    else
      place_h<T>(a, i - parts_1 - parts_2);
  }
}

}  // namespace fastrnn::cuda
