// What the calls on the CPU share: tensors' memory and scratch, reading and writing rows, weights and
// products.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#include "blocks.h"
#include "dispatch.h"
#include "plan.h"
#include "scratch.h"

namespace fastrnn::cpu {

template <class E>
constexpr ScalarType kScalar = sizeof(E) == sizeof(float) ? ScalarType::Float : ScalarType::Double;

template <>
inline constexpr ScalarType kScalar<Bf16> = ScalarType::BFloat16;

// rows [begin, end) on each thread of torch's pool, with denormals as in run_team.
template <class F>
void for_rows(int64_t rows, int64_t work_per_row, F&& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(work_per_row, 1));
  const auto flushed = [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    f(begin, end);
  };
  if (rows <= grain) {
    if (rows > 0) flushed(0, rows);
    return;
  }
  torch::stable::parallel_for(0, rows, grain, flushed);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// n elements of a tensor (E, or bfloat16 where E is float) from or to E.
inline void read(const Tensor& t, int64_t at, int64_t n, Bf16* to) {
  if (n > 0) std::memcpy(to, static_cast<const Bf16*>(t.const_data_ptr()) + at, n * sizeof(Bf16));
}
template <class E>
void read(const Tensor& t, int64_t at, int64_t n, E* to) {
  if (dtype_of(t) == ScalarType::BFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(t.const_data_ptr()) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<E>(from_bf16(p[i]));
  } else if (n > 0) {
    std::memcpy(to, static_cast<const E*>(t.const_data_ptr()) + at, n * sizeof(E));
  }
}
template <class E>
void write(const E* from, int64_t n, const Tensor& t, int64_t at) {
  if (dtype_of(t) == ScalarType::BFloat16) {
    uint16_t* p = static_cast<uint16_t*>(t.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < n; ++i) p[i] = to_bf16(static_cast<float>(from[i]));
  } else if (n > 0) {
    std::memcpy(static_cast<E*>(t.mutable_data_ptr()) + at, from, n * sizeof(E));
  }
}

inline void write(const Bf16* from, int64_t n, const Tensor& t, int64_t at) {
  if (n > 0) std::memcpy(static_cast<Bf16*>(t.mutable_data_ptr()) + at, from, n * sizeof(Bf16));
}

// A vector of any instruction set divides it.
template <class E>
inline constexpr int64_t kWidest = 64 / sizeof(E);

// Rows of scratch: whole vectors, and never a power of two.
template <class E>
int64_t padded(int64_t width) {
  return ceil_div(width, kWidest<E>) * kWidest<E> + std::max<int64_t>(kWidest<E>, 16);
}

// The biases of one direction as [G][padded H]; left alone where there are none.
template <class E>
void read_biases(const LayerArgs::Direction& p, int64_t gates, int64_t H, E* bx, E* bh) {
  const int64_t ld = padded<E>(H);
  for (int64_t g = 0; g < gates && p.b_ih; ++g) {
    read(*p.b_ih, g * H, H, bx + g * ld);
    read(*p.b_hh, g * H, H, bh + g * ld);
  }
}

// f(E{}, A{}) of the types that a call with tensors of type t computes in, by the instruction set in force:
// its arithmetic's, and that of what is multiplied.
template <class F>
auto by_type(ScalarType t, F&& f) {
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16,
                  "the cpu backend takes float32, float64 and bfloat16");
  if (t == ScalarType::Double) return f(double{}, double{});
  if (t == ScalarType::BFloat16 && kernels<float, Bf16>().count > 0) return f(float{}, Bf16{});
  return f(float{}, float{});
}

template <class E, class A>
bool by_tiles() {
  return kernels<E, A>().packing == Packing::kTiles;
}

template <class E, class A>
int64_t input_steps(const LayerArgs& a, int64_t columns) {
  return input_steps(a, columns, sizeof(E), by_tiles<E, A>());
}

// Of the backward scan; the products after it are shared out by themselves.
template <class E, class A>
Plan backward_plan(const LayerArgs& a, int64_t G) {
  const int64_t step = a.B * G * a.H * a.P;
  return Plan(a, step, a.D * a.T * step, G * a.H * a.P * static_cast<int64_t>(sizeof(A)),
              ceil_div(a.H, kernels<E, A>().width));
}

// Where x lies. (The strides of a contiguous tensor say nothing where it has one step or one sequence.)
template <class E>
Input<E> input_of(const LayerArgs& a) {
  void* data = a.x.mutable_data_ptr();
  const bool bf16 = a.dtype == ScalarType::BFloat16;
  if (a.x.is_contiguous()) return {{data, a.I, bf16}, 0, 0};
  if (a.packed()) return {{data, a.x.stride(0), bf16}, 0, 0};
  return {{data, a.x.stride(1), bf16}, a.B, a.x.stride(0)};
}

// keep [N] of one direction: 0 where a reset cuts the state that enters the step. `cut` [T, B]; in reverse
// the boundary that a sequence crosses on entering step t is the one before t + 1.
inline void fill_keep(const RowTable& table, const LayerArgs& a, bool reverse, const bool* cut,
                      uint8_t* keep) {
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t boundary = reverse ? t + 1 : t;
    for (int64_t i = 0; i < table.active[t]; ++i) {
      const bool crossed = boundary < a.T && i < table.active[boundary];
      keep[table.offset[t] + i] = !(crossed && cut[boundary * a.B + table.caller(i)]);
    }
  }
}

// K padded as what is multiplied is.
template <class A>
constexpr int64_t deep(int64_t K) {
  return ceil_div(K, kDepth<A>) * kDepth<A>;
}

// The rows of a packed block of K terms. A tile reads several blocks at once: of one gate, a multiple of 16
// lines apart, they would meet in few sets of the first-level cache.
template <class A>
constexpr int64_t apart(int64_t K) {
  return kDepth<A> == 1 && K % 16 == 0 ? K + 1 : deep<A>(K);
}
// The same for Weight::ld and Pack::to_K. Of bfloat16 none: its products count K by the gates of their own.
template <class A>
constexpr int64_t block_rows(int64_t K) {
  return kDepth<A> == 1 ? apart<A>(K) : 0;
}

// The rows of a block of h's terms and then x's.
template <class A>
constexpr int64_t joint_rows(int64_t I, int64_t P) {
  return apart<A>(deep<A>(I) + deep<A>(P));
}

// A weight's rows by gate and unit, K long and ld apart; to_gates: among so many gates, 0: these are all.
inline Pack by_rows(int64_t gates, int64_t units, int64_t K, int64_t ld, int64_t to_gates = 0) {
  return {nullptr, false, gates, units * ld, units, ld, K, 1, to_gates};
}
// Its transpose, units its columns, K of its rows for each gate, ld apart; to_K: among so many, likewise.
inline Pack by_columns(int64_t gates, int64_t units, int64_t K, int64_t ld, int64_t to_K = 0) {
  return {nullptr, false, gates, K * ld, units, 1, K, ld, 0, to_K};
}

// Rows [offset, offset + gates * units) of w, to be packed among `all` columns; 0: by themselves.
inline Pack pack_of(const Tensor& w, int64_t offset, int64_t gates, int64_t units, int64_t all) {
  const int64_t K = w.size(1);
  Pack p = by_rows(gates, units, K, K);
  p.src = static_cast<const char*>(w.const_data_ptr()) + offset * K * w.element_size();
  p.bf16 = dtype_of(w) == ScalarType::BFloat16;
  p.to_K = all;
  return p;
}

// The parts that x [I] and h [P] meet of a weight packed as one of K = P + I, h first; of tiles, in each
// gate's column.
template <class A>
std::pair<Weight<A>, Weight<A>> two_of(const A* w, int64_t I, int64_t P, int64_t gates, int64_t width,
                                       Packing packing) {
  const int64_t all = joint_rows<A>(I, P);
  const int64_t row = (packing == Packing::kTiles ? 1 : gates) * width;
  return {{w + deep<A>(P) * row, Weight<A>::kPacked, all}, {w, Weight<A>::kPacked, all}};
}

// The weights of a call as its products want them: where they lie when few rows use them, else packed, by the
// team that will use them.
template <class E, class A = E>
class Weights {
 public:
  // Measured at H = 64 to 512, packing pays from 16 rows on. Products of bfloat16 gain from half of that.
  static constexpr bool kHalves = sizeof(A) < sizeof(E);
  static constexpr int64_t kFewRows = kHalves ? 8 : 16, kFewSequences = 4;

  // The rows of a call up to which R stays where it lies, and is multiplied apart from W. Of few sequences a
  // step gains by packing the same for any K, as no lanes are folded, and packing costs in proportion to K:
  // it pays from K / 4 rows on, or K / 2 where steps wait for the third level either way; of bfloat16 as soon
  // as steps are small.
  static int64_t few(const LayerArgs& a, int64_t gates) {
    if (a.B > kFewSequences) return kFewRows;
    if (kHalves) return 16;
    const int64_t bytes = gates * a.H * a.P * static_cast<int64_t>(sizeof(A));
    return std::clamp<int64_t>(a.P / (bytes <= second_level_cache() ? 4 : 2), kFewRows, 256);
  }

  Weights(Arena& arena, const LayerArgs& a)
      : arena_(arena), kernels_(kernels<E, A>()), rows_(a.T * a.B), direct_(a.dtype == kScalar<A>) {}

  // p: the gates, units and strides, in elements, of w from `offset` on.
  Weight<A> get(const Tensor& w, int64_t offset, Pack p, int64_t few = kFewRows) {
    p.src = static_cast<const char*>(w.const_data_ptr()) + offset * w.element_size();
    p.bf16 = dtype_of(w) == ScalarType::BFloat16;
    if (direct_ && rows_ <= few) {
      const A* src = static_cast<const A*>(p.src);
      if (p.k_stride == 1) return {src, Weight<A>::kRows, p.unit_stride};
      if (p.units % kernels_.width == 0 && sizeof(A) == sizeof(E))
        return {src, Weight<A>::kColumns, p.k_stride};
    }
    const int64_t blocks = ceil_div(p.units, kernels_.width);
    p.to_K = block_rows<A>(p.K);
    A* dst = arena_.get<A>(blocks * apart<A>(p.K) * p.gates * kernels_.width);
    jobs_.push_back({p, dst, blocks});
    return {dst, Weight<A>::kPacked, p.to_K};
  }

  // The weights of x and of h, [gates * units][I] and [gates * units][P], packed as one of K = P + I, h
  // first.
  std::pair<Weight<A>, Weight<A>> both(const Tensor& w_x, const Tensor& w_h, int64_t gates, int64_t units) {
    const int64_t I = w_x.size(1), P = w_h.size(1), blocks = ceil_div(units, kernels_.width);
    A* dst = arena_.get<A>(blocks * joint_rows<A>(I, P) * gates * kernels_.width);
    const auto [x, h] = two_of(dst, I, P, gates, kernels_.width, kernels_.packing);
    for (const auto& [w, to] : {std::pair(&w_x, x), std::pair(&w_h, h)}) {
      jobs_.push_back({pack_of(*w, 0, gates, units, to.ld), const_cast<A*>(to.data), blocks});
    }
    return {x, h};
  }

  // This member's share of the packing; called by all of a team.
  void pack(const Team& team) {
    for (const Job& job : jobs_) {
      kernels_.pack(job.pack, job.dst, job.blocks * team.member / team.size,
                    job.blocks * (team.member + 1) / team.size);
    }
    if (!jobs_.empty()) team.meet();
  }

 private:
  struct Job {
    Pack pack;
    A* dst;
    int64_t blocks;
  };
  Arena& arena_;
  const Kernels<E, A>& kernels_;
  const int64_t rows_;
  const bool direct_;  // of the kernels' own type, and read by them where it lies
  std::vector<Job> jobs_;
};

inline constexpr size_t kLargeTensor = 4 << 20;

inline std::array<int64_t, 4> dense_strides(const Shape& shape) {
  std::array<int64_t, 4> strides{1, 1, 1, 1};
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(shape.begin()[i], 1);
  }
  return strides;
}

// A new tensor on the CPU, past the dispatcher: for a short call that is a tenth of its time.
inline Tensor empty(const Shape& shape, ScalarType dtype) {
  const int64_t dims = static_cast<int64_t>(shape.size());
  AtenTensorHandle handle = nullptr;
  const auto error =
      aoti_torch_empty_strided(dims, shape.begin(), dense_strides(shape).data(), static_cast<int32_t>(dtype),
                               aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of ", dims, " dimensions");
  Tensor t(handle);
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes >= kLargeTensor) ask_for_large_pages(t.mutable_data_ptr(), bytes);
  return t;
}

// The same of E, for what a forward pass keeps for its backward pass: large ones in memory that waits for the
// next. Their storage cannot be resized.
template <class E>
Tensor pooled(const Shape& shape) {
  size_t bytes = sizeof(E);
  bool countable = true;
  for (const int64_t n : shape) countable &= !__builtin_mul_overflow(bytes, static_cast<size_t>(n), &bytes);
  Block* const block = countable && bytes >= kLargeTensor ? take_block(bytes) : nullptr;
  if (!block) return empty(shape, kScalar<E>);
  const std::array<int64_t, 4> strides = dense_strides(shape);
  return torch::stable::from_blob(block->data, {shape.begin(), shape.size()}, {strides.data(), shape.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalar<E>,
                                  [block](void*) { give_back(block); });
}

inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, {shape.begin(), shape.size()}, dtype);
}

}  // namespace fastrnn::cpu
