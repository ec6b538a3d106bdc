// The recurrent product of a block: its slice of the weights, [N, k], times 16 sequences, [k, 16].
//
// A *piece* is 64 bytes of k: of a sequence's row of the source four lanes read 16 bytes each, which are a
// lane's operands of two steps of mma, and so are two times 16 bytes of 16 columns of the weights. Weights
// are packed [k / piece, N / 16, 2, lane, 16 bytes]. Eight warps share the work: WK parts of k (pieces wk,
// wk + WK ...), 8 / WK parts of N. Their sums meet in shared memory.
#pragma once

#include "types.h"

namespace fastrnn::cuda {

constexpr int kThreads = 256, kWarps = 8, kRows = 16, kPieceBytes = 64;

// How a thread's registers are shared out, by the number of a warp's column tiles in this stage and in the
// widest, of a kernel of one stage or two, whose threads have so many outputs: 16-byte parts that a row of
// the source has in flight, and pieces of the weights that are held. `most` is what all of these and the sums
// may take; near: the source is shared memory.
struct Registers {
  int depth, held;
};
constexpr Registers share_registers(int tiles, int widest, bool two, int outputs, int most, bool near) {
  const int depth = near || outputs > 2 || widest > 4 ? 2 : widest == 1 && !two ? 8 : 4;
  const int left = (most - 8 * widest - 8 * depth) / (two ? 2 : 1), held = left / 8 / tiles;
  return {depth, held < 0 ? 0 : held > 16 ? 16 : held};
}

// STEP: parts of k; DEPTH, HELD: see Registers; NEAR: the source is shared memory, and all of it there.
template <class T, int TILES, int STEP, int DEPTH, int HELD, bool NEAR>
struct Product {
  uint4 held[HELD > 0 ? HELD : 1][TILES][2];
  uint4 b[DEPTH][2];    // parts of the source on their way, a ring: of a sequence, of the 8th after it
  bool on_their_way;    // those of the next product are
  const uint4* packed;  // this warp's first piece and tile, and lane, of the block's weights
  const uint4* shared;  // likewise of its pieces after those held
  int64_t apart;        // from piece to piece of packed
  int first, pieces;
  int begin_shared, end_shared;

  // weights: the block's; columns: of 16, all of the block's; count: pieces of k; resident: shared memory for
  // `in_shared` pieces of all warps.
  __device__ __forceinline__ void prepare(const uint4* weights, int columns, int count, int part,
                                          int first_tile, bool in_registers, uint4* resident, int in_shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first = part, on_their_way = false;
    pieces = count > part ? (count - part + STEP - 1) / STEP : 0;
    packed = weights + (int64_t(part) * columns + first_tile) * 64 + lane;
    apart = int64_t(columns) * 64 * STEP;
    begin_shared = in_registers ? HELD : 0;
    end_shared = begin_shared + in_shared;
#pragma unroll
    for (int j = 0; j < HELD; j++)
#pragma unroll
      for (int n = 0; n < TILES * 2; n++)
        held[j][n / 2][n % 2] = in_registers && j < pieces ? packed[j * apart + n * 32] : uint4{0, 0, 0, 0};
    uint4* own = resident + (warp * in_shared * TILES) * 64 + lane;
    shared = own;
    for (int j = begin_shared; j < end_shared && j < pieces; j++)
#pragma unroll
      for (int n = 0; n < TILES * 2; n++)
        own[((j - begin_shared) * TILES * 2 + n) * 32] = packed[j * apart + n * 32];
  }

  // Where a product's sequences come from: this lane's, at its part of this warp's first piece; `below` bytes
  // further the 8th after it. One that is not live reads as zeros; tall: whether there are more than 8. wait:
  // until all of it is there; eager: see Args.
  struct Source {
    const char* place;
    int64_t below;
    bool live_0, live_1, tall, wait, eager;
    int64_t patience;
  };

  // meanwhile: done while the first pieces are on their way.
  template <class F>
  __device__ __forceinline__ void multiply(float (&acc)[TILES][2][4], const Source& source, bool exact,
                                           F meanwhile) {
    if (source.tall)
      multiply_all<true>(acc, source, exact, meanwhile);
    else
      multiply_all<false>(acc, source, exact, meanwhile);
  }

  template <bool TALL, class F>
  __device__ __forceinline__ void multiply_all(float (&acc)[TILES][2][4], Source source, bool exact,
                                               F& meanwhile) {
    source.tall = TALL;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 8; i++) acc[n][i / 4][i % 4] = 0.0f;
    if (begin_shared) {
      begin<0>(source, meanwhile);
#pragma unroll
      for (int j = 0; j < HELD; j++) {
        if (j >= pieces) break;
        settle(b[j % DEPTH], j, source);
#pragma unroll
        for (int n = 0; n < TILES; n++) add<TALL>(acc[n], held[j][n], b[j % DEPTH], exact);
        fetch(b[j % DEPTH], j + DEPTH, source);
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
          constexpr int EARLY = TILES < 2 ? TILES : 2;
          const uint4* const w =
              j < end_shared ? shared + (j - begin_shared) * TILES * 64 : packed + j * apart;
          uint4 early[EARLY][2];
#pragma unroll
          for (int n = 0; n < EARLY * 2; n++) early[n / 2][n % 2] = w[n * 32];
          uint4(&part)[2] = b[(HELD + i) % DEPTH];
          settle(part, j, source);
#pragma unroll
          for (int n = 0; n < TILES; n++) {
            if (n < EARLY) {
              add<TALL>(acc[n], early[n], part, exact);
            } else {
              const uint4 late[2] = {w[n * 64], w[n * 64 + 32]};
              add<TALL>(acc[n], late, part, exact);
            }
          }
          fetch(part, j + DEPTH, source);
        }
      }
    }
    if constexpr (!TALL) {
#pragma unroll
      for (int i = 0; i < TILES * 4; i++) acc[i / 4][0][i % 4] += acc[i / 4][1][i % 4];
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
  __device__ __forceinline__ void put(const float (&acc)[TILES][2][4], float* sums, int row,
                                      bool tall) const {
    const int lane = threadIdx.x % 32;
    float* const to = sums + lane % 4 * 2 * row + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half && !tall) break;
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(8 * half + i % 2) * row + n * 16 + i / 2 * 8] = acc[n][half][i];
    }
  }

 private:
  static __device__ __forceinline__ uint4 load(const char* p) {
    if constexpr (NEAR)
      return load_shared(p);
    else
      return load_relaxed(p);
  }

  __device__ __forceinline__ void fetch(uint4 (&b)[2], int j, const Source& source) const {
    if (j >= pieces) return;
    const char* p = source.place + j * (STEP * kPieceBytes);
    b[0] = NEAR || source.live_0 ? load(p) : uint4{0, 0, 0, 0};
    if (source.tall) b[1] = NEAR || source.live_1 ? load(p + source.below) : uint4{0, 0, 0, 0};
  }

  static __device__ __forceinline__ bool pending(const uint4 (&b)[2], bool tall) {
    return b[0].x == kPending || b[0].y == kPending || b[0].z == kPending || b[0].w == kPending ||
           (tall && (b[1].x == kPending || b[1].y == kPending || b[1].z == kPending || b[1].w == kPending));
  }

  template <int FROM>
  __device__ __forceinline__ void fetch_ring(const Source& source) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) fetch(b[(FROM + i) % DEPTH], i, source);
  }

  // The first pieces, from slot FROM of the ring on. What is fetched too early is fetched again: of many
  // blocks that would take the cache's whole time, so these look for their first piece alone, then fetch the
  // others.
  template <int FROM, class F>
  __device__ __forceinline__ void begin(Source& source, F& meanwhile) {
    if constexpr (NEAR) {
      fetch_ring<FROM>(source);
      meanwhile();
    } else if (!source.wait || source.eager || on_their_way) {
      if (!on_their_way) fetch_ring<FROM>(source);
      on_their_way = false;
      meanwhile();
      if (!source.wait) return;
      bool again = true;
      while (again) {
        again = false;
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
          if (i < pieces && pending(b[(FROM + i) % DEPTH], source.tall)) {
            again = true;
            fetch(b[(FROM + i) % DEPTH], i, source);
          }
        }
        if (again && --source.patience < 0) give_up();
      }
    } else {
      fetch(b[FROM], 0, source);
      meanwhile();
      if (pieces > 0) settle(b[FROM], 0, source);
#pragma unroll
      for (int i = 1; i < DEPTH; i++) fetch(b[(FROM + i) % DEPTH], i, source);
    }
  }

  __device__ __forceinline__ void settle(uint4 (&b)[2], int j, Source& source) const {
    if constexpr (NEAR) return;
    if (source.wait) {
      while (pending(b, source.tall)) {
        if (--source.patience < 0) give_up();
        fetch(b, j, source);
      }
    }
    __syncwarp();
  }

  // c of both eights of sequences, or in two parts of one: a sum has to wait for the one before.
  template <bool TALL>
  static __device__ __forceinline__ void add(float (&c)[2][4], const uint4 (&w)[2], const uint4 (&b)[2],
                                             bool exact) {
    T::add(c[0], exact, w[0], b[0].x, b[0].y);
    if constexpr (TALL) {
      T::add(c[1], exact, w[0], b[1].x, b[1].y);
      T::add(c[0], exact, w[1], b[0].z, b[0].w);
      T::add(c[1], exact, w[1], b[1].z, b[1].w);
    } else {
      T::add(c[1], exact, w[1], b[0].z, b[0].w);
    }
  }
};

}  // namespace fastrnn::cuda
