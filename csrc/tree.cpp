// fastrnn::tree_slots and fastrnn::tree_schedule: O(N), and without recursion.
#include "tree.h"

#include <numeric>

namespace fastrnn {
namespace {

// What is wrong with a forest, for Python to put in words: {kind, node, another node or value}.
enum Problem : int64_t { kNone, kParentOutOfRange, kCycle, kNegativeSlot, kSameSlot };

struct Indices {
  Tensor owner;
  const int64_t* data;
  int64_t operator[](int64_t i) const { return data[i]; }
};

Indices indices(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 1 && dtype_of(t) == ScalarType::Long && (count < 0 || t.size(0) == count),
      name, " must be a LongTensor [N] on the CPU");
  Tensor owner = dense(t);
  const int64_t* data = static_cast<const int64_t*>(owner.const_data_ptr());
  return {std::move(owner), data};
}

using Rows = std::vector<int64_t>;

// Rows of equal `key`, keys below `count`, one after another, each in the order of `rows`.
template <class Key>
Rows counting_sort(const Rows& rows, int64_t count, Key&& key) {
  Rows at(count + 1), sorted(rows.size());
  for (const int64_t row : rows) ++at[key(row) + 1];
  std::partial_sum(at.begin(), at.end(), at.begin());
  for (const int64_t row : rows) sorted[at[key(row)]++] = row;
  return sorted;
}

// Children of each node, in increasing order.
struct Children {
  Rows first, nodes;  // [N + 1], [E]
  Children(const Indices& parents, int64_t N) : first(N + 1) {
    for (int64_t n = 0; n < N; ++n) {
      if (parents[n] >= 0) ++first[parents[n] + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    nodes.resize(first[N]);
    Rows at(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < N; ++n) {
      if (parents[n] >= 0) nodes[at[parents[n]]++] = n;
    }
  }
};

// Nodes, every child before its parent (Kahn, "Topological sorting of large networks", 1962); fewer than N
// where there is a cycle.
Rows children_first(const Indices& parents, const Children& children, int64_t N) {
  Rows order, left(N);
  order.reserve(N);
  for (int64_t n = 0; n < N; ++n) {
    left[n] = children.first[n + 1] - children.first[n];
    if (left[n] == 0) order.push_back(n);
  }
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t parent = parents[order[i]];
    if (parent >= 0 && --left[parent] == 0) order.push_back(parent);
  }
  return order;
}

// A node on a cycle, where not all nodes were reached.
int64_t on_a_cycle(const Rows& reached, int64_t N) {
  std::vector<bool> known(N);
  for (const int64_t n : reached) known[n] = true;
  // Whoever is not reached has a child that is not, and so on, round a cycle; which nobody leaves, as each
  // has one parent.
  return std::find(known.begin(), known.end(), false) - known.begin();
}

struct Report {
  int64_t kind = kNone, node = 0, other = 0;
};

Report check(const Indices& parents, const Indices* slots, Rows& filled, int64_t N) {
  for (int64_t n = 0; n < N; ++n) {
    if (parents[n] < -1 || parents[n] >= N) return {kParentOutOfRange, n, parents[n]};
  }
  const Children children(parents, N);
  const Rows reached = children_first(parents, children, N);
  if (static_cast<int64_t>(reached.size()) < N) {
    const int64_t node = on_a_cycle(reached, N);
    return {kCycle, node, parents[node]};
  }
  std::vector<std::pair<int64_t, int64_t>> own;  // slot, node
  for (int64_t parent = 0; parent < N; ++parent) {
    own.clear();
    for (int64_t i = children.first[parent]; i < children.first[parent + 1]; ++i) {
      const int64_t n = children.nodes[i], slot = slots ? (*slots)[n] : i - children.first[parent];
      if (slot < 0) return {kNegativeSlot, n, slot};
      own.emplace_back(slot, n);
      filled[n] = slot;
    }
    if (!std::is_sorted(own.begin(), own.end())) std::sort(own.begin(), own.end());
    for (size_t i = 1; i < own.size(); ++i) {
      if (own[i].first == own[i - 1].first) return {kSameSlot, own[i].second, own[i - 1].second};
    }
  }
  return {};
}

Tensor new_indices(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_zeros(like, {sizes.begin(), sizes.size()}, ScalarType::Long);
}

int64_t* writable(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

// The slots of all nodes (0 at roots), and what is wrong: LongTensor [3].
std::tuple<Tensor, Tensor> tree_slots(Tensor parents, OptionalTensor slots) {
  const Indices p = indices("parents", parents, -1);
  const int64_t N = parents.size(0);
  Rows filled(N);
  std::optional<Indices> given;
  if (slots) given = indices("slots", *slots, N);
  const Report report = check(p, given ? &*given : nullptr, filled, N);
  Tensor out = new_indices(parents, {N}), problem = new_indices(parents, {3});
  std::copy(filled.begin(), filled.end(), writable(out));
  const int64_t words[] = {report.kind, report.node, report.other};
  std::copy(std::begin(words), std::end(words), writable(problem));
  return {std::move(out), std::move(problem)};
}

Tensor tree_schedule(Tensor parents, Tensor slots, bool down) {
  const Indices p = indices("parents", parents, -1);
  const int64_t N = parents.size(0);
  const Indices s = indices("slots", slots, N);
  Rows filled(N);
  STD_TORCH_CHECK(check(p, &s, filled, N).kind == kNone, "tree_schedule needs parents and slots of a forest");
  const Children children(p, N);
  const Rows reached = children_first(p, children, N);
  Rows level(N);
  int64_t count = N > 0 ? 1 : 0;
  const auto raise = [&](int64_t node, int64_t to) {
    level[node] = std::max(level[node], to);
    count = std::max(count, to + 1);
  };
  for (int64_t i = 0; i < N; ++i) {
    const int64_t n = reached[down ? N - 1 - i : i];
    if (p[n] < 0) continue;
    down ? raise(n, level[p[n]] + 1) : raise(p[n], level[n] + 1);
  }
  // Within a level nodes with as many slots stand together: they are one matrix product.
  const auto above = [&](int64_t slot) { return std::min(slot, N - 1) + 1; };
  const auto slot_key = [&](int64_t n) {
    int64_t key = 0;
    if (down) {
      key = p[n] < 0 ? 0 : above(s[n]);
    } else {
      for (int64_t i = children.first[n]; i < children.first[n + 1]; ++i) {
        key = std::max(key, above(s[children.nodes[i]]));
      }
    }
    return key;
  };
  Rows nodes(N), keys(N);
  std::iota(nodes.begin(), nodes.end(), 0);
  for (int64_t n = 0; n < N; ++n) keys[n] = slot_key(n);
  nodes = counting_sort(nodes, N + 1, [&](int64_t n) { return keys[n]; });
  nodes = counting_sort(nodes, count, [&](int64_t n) { return level[n]; });

  Tensor out = new_indices(parents, {5, N + 1});
  int64_t *order = writable(out), *levels = order + N + 1, *first = levels + N + 1, *source = first + N + 1,
          *slot = source + N + 1;
  std::fill(levels, levels + N + 1, N);
  int64_t edges = 0;
  for (int64_t i = 0; i < N; ++i) {
    const int64_t n = nodes[i];
    order[i] = n;
    if (i == 0 || level[n] != level[nodes[i - 1]]) levels[level[n]] = i;
    first[i] = edges;
    if (down) {
      if (p[n] >= 0) {
        slot[edges] = s[n];
        source[edges++] = p[n];
      }
    } else {
      for (int64_t k = children.first[n]; k < children.first[n + 1]; ++k) {
        slot[edges] = s[children.nodes[k]];
        source[edges++] = children.nodes[k];
      }
    }
  }
  first[N] = edges;
  return out;
}

}  // namespace

Schedule check_schedule(const Tensor& schedule, int64_t slots) {
  STD_TORCH_CHECK(schedule.is_cpu() && schedule.dim() == 2 && schedule.size(0) == 5 && schedule.size(1) > 0 &&
                      dtype_of(schedule) == ScalarType::Long,
                  "schedule must be the LongTensor [5, N + 1] of tree_schedule, on the CPU");
  Schedule s{dense(schedule), schedule.size(1) - 1, 0, 0, {}, {}, {}, {}, {}};
  const int64_t N = s.N;
  s.order = static_cast<const int64_t*>(s.data.const_data_ptr());
  s.levels = s.order + N + 1;
  s.first = s.levels + N + 1;
  s.source = s.first + N + 1;
  s.slot = s.source + N + 1;
  const char* broken = "schedule is not one that tree_schedule made";
  STD_TORCH_CHECK(s.levels[0] == 0 && s.first[0] == 0 && s.levels[N] == N, broken);
  while (s.levels[s.L] < N) {
    ++s.L;
    STD_TORCH_CHECK(s.levels[s.L] > s.levels[s.L - 1] && s.levels[s.L] <= N, broken);
  }
  s.E = s.first[N];
  STD_TORCH_CHECK(s.E >= 0 && s.E <= N, broken);
  Rows level(N, -1), taken(slots, -1);  // by which node a slot was, last
  for (int64_t l = 0; l < s.L; ++l) {
    for (int64_t p = s.levels[l]; p < s.levels[l + 1]; ++p) {
      const int64_t n = s.order[p];
      STD_TORCH_CHECK(
          n >= 0 && n < N && level[n] < 0 && s.first[p] <= s.first[p + 1] && s.first[p + 1] <= s.E, broken);
      level[n] = l;
      for (int64_t e = s.first[p]; e < s.first[p + 1]; ++e) {
        const int64_t from = s.source[e];
        STD_TORCH_CHECK(from >= 0 && from < N && level[from] >= 0 && level[from] < l && s.slot[e] >= 0,
                        broken);
        if (slots == 0) continue;
        STD_TORCH_CHECK(s.slot[e] < slots, "node ", n, " has an edge of slot ", s.slot[e], ", the cell has ",
                        slots);
        STD_TORCH_CHECK(taken[s.slot[e]] != n, broken);
        taken[s.slot[e]] = n;
      }
    }
  }
  return s;
}

}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("tree_slots", TORCH_BOX(&fastrnn::tree_slots));
  m.impl("tree_schedule", TORCH_BOX(&fastrnn::tree_schedule));
}
