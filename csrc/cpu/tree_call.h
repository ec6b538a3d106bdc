// What the two directions of a call of a recursive cell on the CPU share.
#pragma once

#include "../tree.h"
#include "tree_params.h"
#include "workspace.h"

namespace fastrnn::cpu {

// Shares out levels over a team. Levels shorter than a barrier are left to its first member, and the others
// wait only where they need what it made.
class Levels {
 public:
  Levels(const Team& team, int64_t weight_bytes, int width)
      : team_(team), weight_bytes_(weight_bytes), width_(width) {}

  // Calls run(begin, end, block0, block1) for this member's share of the rows and units. work: its
  // multiplications.
  template <class Run>
  void run(int64_t begin, int64_t end, int64_t units, int64_t work, Run&& run) {
    constexpr int64_t kLeast = 32768;
    const int64_t blocks = ceil_div(units, width_);
    if (begin == end) return;
    if (work < kLeast || team_.size == 1) {
      if (team_.member == 0) run(begin, end, 0, blocks);
      alone_ = true;
      return;
    }
    meet();
    const int parts = unit_parts(end - begin, blocks), each = team_.size / parts;
    const int64_t row = team_.member / parts, unit = team_.member % parts, n = end - begin;
    if (row < each) {
      run(begin + n * row / each, begin + n * (row + 1) / each, blocks * unit / parts,
          blocks * (unit + 1) / parts);
    }
    team_.meet();
  }

  // After this, everybody sees what the levels so far made.
  void meet() {
    if (alone_) team_.meet();
    alone_ = false;
  }

 private:
  // As few parts as leave a member's weights in its second-level cache, while there are rows for the others.
  int unit_parts(int64_t rows, int64_t blocks) const {
    constexpr int64_t kRowsEach = 6;
    for (int parts = 1; parts < team_.size; ++parts) {
      if (team_.size % parts == 0 && rows >= kRowsEach * (team_.size / parts) && blocks >= parts &&
          weight_bytes_ / parts <= second_level_cache() * 3 / 5) {
        return parts;
      }
    }
    return static_cast<int>(std::min<int64_t>(team_.size, blocks));
  }

  const Team& team_;
  const int64_t weight_bytes_;
  const int width_;
  bool alone_ = false;
};

// The arguments of tree and tree_backward, checked; the schedule's tables; and weights as they are packed.
template <class E>
class TreeCall {
 public:
  TreeCall(const std::string& name, const OptionalTensor& x, const TensorList& params, const Tensor& schedule)
      : cell_(find(name)) {
    STD_TORCH_CHECK(params.size() == 2 || params.size() == 4,
                    "params must be (w_ih, w_hh[, b_ih, b_hh]), got ", params.size(), " tensors");
    STD_TORCH_CHECK(params[0].dim() == 2 && params[1].dim() == 2, "weights must have 2 dimensions");
    const int64_t G = cell_.gates, H = params[0].size(0) / G;
    t_.I = params[0].size(1);
    t_.H = H;
    t_.summed = cell_.summed;
    t_.A = cell_.summed || H == 0 ? 1 : params[1].size(1) / H;
    t_.Q = (cell_.summed ? 4 : cell_.states == 2 ? 3 + t_.A : 1) * H;
    STD_TORCH_CHECK(H > 0 && t_.A > 0, "the hidden size and the arity must be at least 1");
    params_.push_back(expect("weight_ih", params[0], {G * H, t_.I}));
    params_.push_back(expect("weight_hh", params[1], {t_.Q, t_.A * H}));
    for (size_t i = 2; i < params.size(); ++i) params_.push_back(expect("bias", params[i], {G * H}));
    s_ = check_schedule(schedule, cell_.summed ? 0 : t_.A);
    t_.N = s_.N;
    if (x) x_ = expect("x", *x, {s_.N, t_.I});
    t_.order = s_.order;
    t_.first = s_.first;
    t_.source = s_.source;
    t_.slot = s_.slot;
    t_.ld = padded<E>(H);
    tables();
  }

 protected:
  static Tensor expect(const char* name, const Tensor& t, const Shape& shape) {
    return fastrnn::expect(name, t, shape, kScalar<E>, true);
  }

  template <class T = E>
  static T* data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
  }

  // Multiplications of a level with so many rows, whose states take so many edges; the gates count too.
  int64_t work(int64_t rows, int64_t edges) const { return t_.H * (rows * 16 + edges * t_.Q); }
  int threads() const { return product_threads(t_.N * cell_.gates * t_.H * t_.I + work(t_.N, s_.E)); }
  Levels levels(const Team& team) const {
    return {team, t_.A * t_.Q * t_.H * static_cast<int64_t>(sizeof(E)), kernels_.width};
  }

  // Room for a weight of G gates and K terms in all.
  E* weight(int64_t G, int64_t units, int64_t K) {
    return arena_.get<E>(ceil_div(units, kernels_.width) * K * G * kernels_.width);
  }
  // p: what of `from`, from `offset` on, goes into `to`.
  void pack(const Tensor& from, int64_t offset, Pack p, E* to) {
    p.src = data(from) + offset;
    jobs_.push_back({p, to, ceil_div(p.units, kernels_.width)});
  }
  void pack(const Team& team) const {
    for (const Job& job : jobs_) {
      kernels_.pack(job.pack, job.to, job.blocks * team.member / team.size,
                    job.blocks * (team.member + 1) / team.size);
    }
    team.meet();
  }

  // Rows of `ld` elements that stay in the first and second-level cache.
  static int64_t at_once(int64_t ld) {
    return std::clamp<int64_t>((int64_t{1} << 18) / (ld * static_cast<int64_t>(sizeof(E))), 12, 96);
  }
  std::vector<TreeScratch<E>> scratch(int members, int64_t widest) {
    std::vector<TreeScratch<E>> all(members);
    const int64_t ld_rows = padded<E>(widest);
    t_.at_once = at_once(ld_rows);
    for (TreeScratch<E>& s : all) {
      s.ld_rows = ld_rows;
      s.rows = arena_.get<E>(t_.at_once * ld_rows);
      s.sums = arena_.get<E>(t_.at_once * t_.ld);
      s.fc = arena_.get<E>(t_.at_once * t_.ld);
      s.edges = arena_.get<int64_t>(t_.at_once * t_.A);
    }
    return all;
  }

  const TreeKernels<E>& cell_;
  const Kernels<E>& kernels_ = kernels<E>();
  Tree<E> t_{};
  Schedule s_{};
  OptionalTensor x_;
  TensorList params_;
  Arena arena_;

 private:
  struct Job {
    Pack pack;
    E* to;
    int64_t blocks;
  };

  static const TreeKernels<E>& find(const std::string& name) {
    const TreeKernels<E>* k = kernels<E>().trees;
    while (k->name && name != k->name) ++k;
    STD_TORCH_CHECK(k->name, "unknown recursive cell ", name);
    return *k;
  }

  void tables() {
    int64_t* target = arena_.get<int64_t>(s_.E);
    int64_t* lo = arena_.zeros<int64_t>(s_.N);
    int64_t* hi = arena_.zeros<int64_t>(s_.N);
    for (int64_t p = 0; p < s_.N; ++p) {
      for (int64_t e = s_.first[p]; e < s_.first[p + 1]; ++e) {
        const int64_t slot = cell_.summed ? 0 : s_.slot[e];
        target[e] = p;
        lo[p] = hi[p] ? std::min(lo[p], slot) : slot;
        hi[p] = std::max(hi[p], slot + 1);
      }
    }
    t_.target = target;
    t_.lo = lo;
    t_.hi = hi;
  }

  std::vector<Job> jobs_;
};

inline void check_tree_dtype(const Tensor& w) {
  const ScalarType t = dtype_of(w);
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double,
                  "the cpu backend's recursive cells take float32 and float64");
}

}  // namespace fastrnn::cpu
