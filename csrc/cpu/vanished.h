// Chunks of steps that a backward pass may pass over, since their gradients are all 0.
#pragma once

#include <atomic>
#include <cstring>
#include <optional>
#include <type_traits>

#include "workspace.h"

namespace fastrnn::cpu {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Word = uint32_t;
  static constexpr Word kExponent = 0x7f800000;
};
template <>
struct Bits<double> {
  using Word = uint64_t;
  static constexpr Word kExponent = 0x7ff0000000000000;
};
template <>
struct Bits<Bf16> {
  using Word = uint16_t;
  static constexpr Word kExponent = 0x7f80;
};

// Whether bad(word) is 0 for every word. Pieces of a length that the compiler knows become vectors; the first
// with another word ends it.
template <class T, class Bad>
bool no_word(const T* p, int64_t n, Bad&& bad) {
  using Word = typename Bits<T>::Word;
  constexpr int64_t kPiece = 128 / sizeof(T);
  const auto found = [&](int64_t begin, auto words) {
    Word word, all = 0;
    for (int64_t j = 0; j < words; ++j) {
      std::memcpy(&word, p + begin + j, sizeof word);
      all |= bad(word);
    }
    return all != 0;
  };
  int64_t i = 0;
  for (; i + kPiece <= n; i += kPiece) {
    if (found(i, std::integral_constant<int64_t, kPiece>{})) return false;
  }
  return !found(i, n - i);
}

// 0 or -0.
template <class T>
bool all_zero(const T* p, int64_t n) {
  using Word = typename Bits<T>::Word;
  return no_word(p, n, [](Word w) { return static_cast<Word>(w << 1); });
}

// Neither infinite nor NaN: adding its lowest bit to an exponent of ones carries into the sign.
template <class T>
bool all_finite(const T* p, int64_t n) {
  using Word = typename Bits<T>::Word;
  constexpr Word kExponent = Bits<T>::kExponent, kLowest = kExponent & -kExponent;
  return no_word(p, n, [](Word w) { return static_cast<Word>(((w & kExponent) + kLowest) & ~kExponent); });
}

// The same of n elements from `at` on of what may be bfloat16.
template <class E>
bool all_zero(const Border<E>& b, int64_t at, int64_t n) {
  return b.bf16 ? all_zero(static_cast<const Bf16*>(b.data) + at, n)
                : all_zero(static_cast<const E*>(b.data) + at, n);
}
template <class E>
bool all_finite(const Border<E>& b, int64_t at, int64_t n) {
  return b.bf16 ? all_finite(static_cast<const Bf16*>(b.data) + at, n)
                : all_finite(static_cast<const E*>(b.data) + at, n);
}

// [0, n) shared out over a team: what falls to this member.
struct Part {
  int64_t begin, end;
  Part(const Team& team, int64_t n)
      : begin(n * team.member / team.size), end(n * (team.member + 1) / team.size) {}
};

// Of one direction, the steps [t0, t1) and rows of the scan's chunk, which is counted from the end of the
// forward scan.
struct Chunk {
  int64_t d, t0, t1, first, rows;

  template <class E, class A>
  Chunk(const Scan<E, A>& scan, int64_t d) : d(d) {
    const bool reverse = scan.dir[d].reverse;
    const int64_t T = scan.rows.T, *offset = scan.rows.offset;
    t0 = reverse ? scan.k0 : T - scan.k1;
    t1 = reverse ? scan.k1 : T - scan.k0;
    first = offset[t0];
    rows = offset[t1] - first;
  }
};

// Whether a chunk's gradients are all 0, as those of a loss on the last step are some hundred steps before
// it: none enters the chunk, none reaches it, and all that they would meet is finite, as 0 times infinity is
// not 0. (Two saved values, each finite, could have an infinite product; no forward pass leaves such.) Then
// neither the scan nor the products after it have anything to do.
template <class E, class A>
class Vanished {
 public:
  Vanished(const LayerArgs& a, int states, const TensorList& saved) : a_(a), states_(states), saved_(saved) {}

  // Called by all of a team, which have met since the chunk before. copied: dy is what they have just copied
  // of the chunk's, each some rows. constants: whether a member's part of weights and first states is finite,
  // once it has looked.
  bool operator()(const Team& team, const Scan<E, A>& scan, const Chunk& c, bool copied,
                  std::optional<bool>& constants) {
    // Of calls of one chunk only those without any gradient would gain.
    if (scan.k0 == 0 && scan.k1 == scan.rows.T) return false;
    if (!none_enters(scan, c)) return false;
    if (copied) team.meet();
    if (!none_reaches(team, scan, c)) reached_[c.d].store(scan.k0, std::memory_order_relaxed);
    team.meet();
    if (reached_[c.d].load(std::memory_order_relaxed) == scan.k0) return false;
    if (!meets_finite(team, scan, c, constants)) infinite_[c.d].store(scan.k0, std::memory_order_relaxed);
    team.meet();
    return infinite_[c.d].load(std::memory_order_relaxed) != scan.k0;
  }

 private:
  // From the step before it, which left its gradient of the gates in one ring; the other holds an older one,
  // which a later chunk would read. And of last states, which wait for the last steps of their sequences. No
  // row beyond those active at the chunk's first step in time has a step in it.
  bool none_enters(const Scan<E, A>& scan, const Chunk& c) const {
    const Direction<E, A>& s = scan.dir[c.d];
    const int64_t rows = scan.rows.active[c.t0];
    bool none = true;
    for (int j = 0; j < 2 && scan.k0 > 0; ++j)  // the last step's first
      none = none && all_zero(s.ring[(scan.k0 + j) & 1], rows * s.ld_ring);
    for (int j = states_; j-- > 0;)  // h's last: after its first step an LSTM has 0 there
      none = none && all_zero(s.state[j], rows * s.ld_state);
    return none;
  }

  // By this member's part of the rows.
  bool none_reaches(const Team& team, const Scan<E, A>& scan, const Chunk& c) const {
    const Direction<E, A>& s = scan.dir[c.d];
    const Part part(team, c.rows);
    bool none = true;
    for (int64_t r = part.begin; r < part.end && none; ++r) {
      const int64_t row = scan.rows.at(c.first + r);
      none = !s.dy.data || all_zero(s.dy, (row - s.dy_first) * s.dy.ld, scan.P);
      for (int j = 1; j < states_; ++j)
        none = none && (!s.dseq[j - 1] || all_zero(s.dseq[j - 1] + row * scan.H, scan.H));
    }
    return none;
  }

  // By this member's part of the rows, and of those of the step before, in the forward scan, whose states
  // entered the chunk.
  bool meets_finite(const Team& team, const Scan<E, A>& scan, const Chunk& c,
                    std::optional<bool>& constants) const {
    const Direction<E, A>& s = scan.dir[c.d];
    const int64_t* const offset = scan.rows.offset;
    const int64_t begin = offset[s.reverse ? c.t0 : std::max<int64_t>(c.t0 - 1, 0)];
    const int64_t end = offset[s.reverse ? std::min(c.t1 + 1, scan.rows.T) : c.t1];
    const Part part(team, end - begin);
    if (!constants) constants = constants_finite(team);
    bool finite = *constants;
    for (int64_t row = begin + part.begin; row < begin + part.end && finite; ++row) {
      const int64_t at = scan.rows.at(row);
      finite = all_finite(scan.x.row(at), 0, a_.I) && all_finite(s.y, at * s.y.ld, scan.P);
      for (int j = 1; j < states_; ++j) finite = finite && all_finite(s.seq[j - 1] + at * scan.H, scan.H);
    }
    for (const Tensor& t : saved_) {  // [D, N, ...]
      const int64_t width = t.size(2), first = c.d * a_.N + begin + part.begin;
      finite = finite && all_finite(static_cast<const E*>(t.const_data_ptr()) + first * width,
                                    (part.end - part.begin) * width);
    }
    return finite;
  }

  // By this member's part of the weights and first states.
  bool constants_finite(const Team& team) const {
    const auto finite = [&](const Tensor& t) {
      const Part part(team, t.numel());
      const Border<E> all{const_cast<void*>(t.const_data_ptr()), 0, dtype_of(t) == ScalarType::BFloat16};
      return all_finite(all, part.begin, part.end - part.begin);
    };
    bool all = true;
    for (const Tensor& t : a_.states) all = all && finite(t);
    for (int64_t d = 0; d < a_.D; ++d) {
      const LayerArgs::Direction& p = a_.params[d];
      all = all && finite(p.w_ih) && finite(p.w_hh) && (!p.w_hr || finite(*p.w_hr));
    }
    return all;
  }

  const LayerArgs& a_;
  const int states_;
  const TensorList& saved_;
  // Of a direction the last chunk, by its k0, that some member found a gradient to reach, or something not
  // finite in. (With one for both a member that is ahead could tell one that is behind the second answer for
  // the first.)
  std::atomic<int64_t> reached_[2]{-1, -1}, infinite_[2]{-1, -1};
};

}  // namespace fastrnn::cpu
