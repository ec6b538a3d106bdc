// The recurrent product of a block: 16 sequences times the columns that it owns, [16, k] x [k, N].
//
// A *piece* is 64 bytes of k: of a row of the source four lanes read 16 bytes each, which are a lane's parts
// of two mma tiles; so are 16 bytes of a column of the weights. Weights are packed [k / piece, N / 8, lane,
// 16 bytes], lane / 4 the column, and lane % 4 its part of the piece. Eight warps share the work: WK parts of
// k (pieces wk, wk + WK ...), 8 / WK parts of N. Their sums meet in shared memory.
#pragma once

#include "types.h"

namespace fastrnn::cuda {

constexpr int kThreads = 256, kWarps = 8, kRows = 16, kPieceBytes = 64;

// How a thread's registers are shared out, by the number of a warp's column tiles in this stage and in the
// widest, of a kernel of one stage or two, whose threads have so many outputs: 16-byte parts that a row of
// the source has in flight, and pieces of the weights that are held. `most` is what all of these and the sums
// may take.
struct Registers {
  int depth, held;
};
constexpr Registers share_registers(int tiles, int widest, bool two, int outputs, int most) {
  const int depth = outputs > 2 || widest > 8 ? 2 : widest > 4 ? 3 : widest == 1 && !two ? 8 : 4;
  const int left = (most - 4 * widest - 8 * depth) / (two ? 2 : 1), held = left / 4 / tiles;
  return {depth, held < 0 ? 0 : held > 16 ? 16 : held};
}

// DEPTH, HELD: see Registers.
template <class T, int TILES, int DEPTH, int HELD>
struct Product {
  uint4 held[HELD > 0 ? HELD : 1][TILES];
  uint4 a[DEPTH][2];    // parts of the source on their way, a ring
  bool on_their_way;    // those of the next product are
  const uint4* packed;  // this warp's first tile, and lane, of the block's weights
  const uint4* shared;  // likewise of its pieces after those held
  int64_t apart;        // from piece to piece of packed
  int first, step, pieces;
  int begin_shared, end_shared;

  // weights: the block's; columns: of 8, all of the block's; count: pieces of k; resident: shared memory for
  // `in_shared` pieces of all warps.
  __device__ __forceinline__ void prepare(const uint4* weights, int columns, int count, int part, int parts,
                                          int first_tile, bool in_registers, uint4* resident, int in_shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first = part, step = parts, on_their_way = false;
    pieces = count > part ? (count - part + parts - 1) / parts : 0;
    packed = weights + first_tile * 32 + lane;
    apart = int64_t(columns) * 32;
    begin_shared = in_registers ? HELD : 0;
    end_shared = begin_shared + in_shared;
#pragma unroll
    for (int j = 0; j < HELD; j++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        held[j][n] = in_registers && j < pieces ? packed[piece(j) * apart + n * 32] : uint4{0, 0, 0, 0};
    uint4* own = resident + (warp * in_shared * TILES) * 32 + lane;
    shared = own;
    for (int j = begin_shared; j < end_shared && j < pieces; j++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        own[((j - begin_shared) * TILES + n) * 32] = packed[piece(j) * apart + n * 32];
  }

  __device__ __forceinline__ int64_t piece(int j) const { return first + j * step; }

  // Where a product's sequences come from: this lane's row, at its part of a piece; `below` bytes further the
  // row 8 below. A row that is not there reads as zeros. wait: until all of it is there; eager: see Args.
  struct Source {
    const char* place;
    int64_t below;
    bool live_0, live_1, wait, eager;
    int64_t patience;
  };

  // meanwhile: done while the first pieces are on their way.
  template <class F>
  __device__ __forceinline__ void multiply(float (&acc)[TILES][4], Source source, bool exact, F meanwhile) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;
    if (begin_shared) {
      begin<0>(source, meanwhile);
#pragma unroll
      for (int j = 0; j < HELD; j++) {
        if (j < pieces) {
          settle(a[j % DEPTH], j, source);
#pragma unroll
          for (int n = 0; n < TILES; n++) add(acc[n], a[j % DEPTH], held[j][n], exact);
          fetch(a[j % DEPTH], j + DEPTH, source);
        }
      }
    } else {
      begin<HELD % DEPTH>(source, meanwhile);
    }
    for (int first_j = begin_shared; first_j < pieces; first_j += DEPTH) {
#pragma unroll
      for (int i = 0; i < DEPTH; i++) {
        const int j = first_j + i;
        if (j < pieces) {
          // Some before the wait; more would take too many registers.
          constexpr int EARLY = TILES < 4 ? TILES : 4;
          const uint4* const w =
              j < end_shared ? shared + (j - begin_shared) * TILES * 32 : packed + piece(j) * apart;
          uint4 b[EARLY];
#pragma unroll
          for (int n = 0; n < EARLY; n++) b[n] = w[n * 32];
          uint4(&part)[2] = a[(HELD + i) % DEPTH];
          settle(part, j, source);
#pragma unroll
          for (int n = 0; n < TILES; n++) add(acc[n], part, n < EARLY ? b[n] : w[n * 32], exact);
          fetch(part, j + DEPTH, source);
        }
      }
    }
  }

  // The first pieces of the next product's source, which is likely to be there.
  __device__ __forceinline__ void look_ahead(const Source& source) {
    if (begin_shared)
      fetch_ring<0>(source);
    else
      fetch_ring<HELD % DEPTH>(source);
    on_their_way = true;
  }

  // acc into sums [16, row].
  __device__ __forceinline__ void put(const float (&acc)[TILES][4], float* sums, int row) const {
    const int lane = threadIdx.x % 32;
    float* to = sums + lane / 4 * row + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      *reinterpret_cast<float2*>(to + n * 8) = float2{acc[n][0], acc[n][1]};
      *reinterpret_cast<float2*>(to + n * 8 + 8 * row) = float2{acc[n][2], acc[n][3]};
    }
  }

 private:
  __device__ __forceinline__ void fetch(uint4 (&a)[2], int j, const Source& source) const {
    if (j >= pieces) return;
    const char* p = source.place + piece(j) * kPieceBytes;
    a[0] = source.live_0 ? load_relaxed(p) : uint4{0, 0, 0, 0};
    a[1] = source.live_1 ? load_relaxed(p + source.below) : uint4{0, 0, 0, 0};
  }

  static __device__ __forceinline__ bool pending(const uint4 (&a)[2]) {
    return a[0].x == kPending || a[0].y == kPending || a[0].z == kPending || a[0].w == kPending ||
           a[1].x == kPending || a[1].y == kPending || a[1].z == kPending || a[1].w == kPending;
  }

  template <int FROM>
  __device__ __forceinline__ void fetch_ring(const Source& source) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) fetch(a[(FROM + i) % DEPTH], i, source);
  }

  // The first pieces, from slot FROM of the ring on. What is fetched too early is fetched again: of many
  // blocks that would take the cache's whole time, so these look for their first piece alone, then fetch the
  // others.
  template <int FROM, class F>
  __device__ __forceinline__ void begin(Source& source, F& meanwhile) {
    if (!source.wait || source.eager || on_their_way) {
      if (!on_their_way) fetch_ring<FROM>(source);
      on_their_way = false;
      meanwhile();
      if (!source.wait) return;
      bool again = true;
      while (again) {
        again = false;
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
          if (i < pieces && pending(a[(FROM + i) % DEPTH])) {
            again = true;
            fetch(a[(FROM + i) % DEPTH], i, source);
          }
        }
        if (again && --source.patience < 0) give_up();
      }
    } else {
      fetch(a[FROM], 0, source);
      meanwhile();
      if (pieces > 0) settle(a[FROM], 0, source);
#pragma unroll
      for (int i = 1; i < DEPTH; i++) fetch(a[(FROM + i) % DEPTH], i, source);
    }
  }

  __device__ __forceinline__ void settle(uint4 (&a)[2], int j, Source& source) const {
    if (source.wait) {
      while (pending(a)) {
        if (--source.patience < 0) give_up();
        fetch(a, j, source);
      }
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void add(float (&c)[4], const uint4 (&a)[2], const uint4& b, bool exact) {
    T::pair(c, exact, a[0].x, a[1].x, a[0].y, a[1].y, b.x, b.y);
    T::pair(c, exact, a[0].z, a[1].z, a[0].w, a[1].w, b.z, b.w);
  }
};

}  // namespace fastrnn::cuda
