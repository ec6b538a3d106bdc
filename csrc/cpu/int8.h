// Products with int8 weights: one scale for each row of the weight, and the rows they meet quantized as they
// come, to 16 bits or a little less, so that no sum of K products leaves an int32. Integer sums are exact:
// what is lost is the weights' rounding, and the same bits come from any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrnn::cpu {

inline constexpr int kMaxGates = 4;  // of a cell

// The kernels read the weights by fours of k. A block of W units is, in floats, scale [G][W], sums of the
// weights [G][W] (int32), then int8 [fours][G][W][4].
inline int64_t int8_fours(int64_t K) { return (K + 3) / 4; }
inline int64_t int8_block(int64_t K, int gates, int width) { return (2 + int8_fours(K)) * gates * width; }

// A quantized row is, in floats: its scale, and from kInt8Head on two planes of int8_plane(K), 16 bits a
// value.
inline constexpr int64_t kInt8Head = 16;
inline int64_t int8_plane(int64_t K) { return (K + 15) / 16 * 4; }
inline int64_t int8_row(int64_t K) { return kInt8Head + 2 * int8_plane(K); }

// The largest value of a quantized row of K; of a weight it is -128, though ours end at -127.
inline constexpr int64_t kInt8MostK = 1 << 17;
inline float int8_levels(int64_t K) {
  return static_cast<float>(std::min<int64_t>(32767, INT32_MAX / (128 * std::max<int64_t>(K, 1))));
}

struct Int8Tile {
  const float* a;  // [M] quantized rows, lda apart
  int64_t lda;
  const float* w;  // [U] blocks, `block` apart
  int64_t block, K;
  const float* bias;  // [G][ld_bias]; null: none
  int64_t ld_bias;
  float* out;  // [M][U][G][W]
};

struct Int8Kernels {
  void (*quantize)(const float* a, int64_t K, float* row);
  void (*tile[kMaxGates])(int M, int U, const Int8Tile&);  // of 1 gate and more
};

}  // namespace fastrnn::cpu
