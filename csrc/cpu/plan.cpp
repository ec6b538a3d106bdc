#include "plan.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrnn::cpu {
namespace {

// The bytes of a level's cache, 0 where there is none or none is known. Linux writes it there for every
// processor; the C library knows x86 alone.
int64_t ask_system(int level) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long known = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (known > 0) return known;
#endif
  char path[64];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
  long long kilobytes = 0;
  if (FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return std::max<int64_t>(kilobytes << 10, 0);
}

constexpr int64_t kLeastStep = 16384;  // multiplications, of a thread

// The rows whose multiplications hide that their weights come from the third level: of it Intel's servers,
// whose cores all share it, read 30 to 46 GB/s a core, AMD's 100. (Of other Intel processors nothing is
// known.)
int64_t rows_of_far() {
#if defined(__x86_64__)
  static const bool intel = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
  }();
  if (intel) return 64;
#endif
  return 16;
}

int64_t steps_of(const LayerArgs& a, int64_t rows) {
  return std::clamp<int64_t>(rows / std::max<int64_t>(a.B, 1), 1, std::max<int64_t>(a.T, 1));
}

// Whether the longest sequences are not much longer than the others: their rows have at most a ninth more of
// the work than the mean.
bool nearly_even(const LayerArgs& a) {
  int64_t rows = a.N;
  if (a.lengths) {
    const auto* lengths = static_cast<const int64_t*>(a.lengths->const_data_ptr());
    rows = 0;
    for (int64_t b = 0; b < a.B; ++b) rows += std::clamp<int64_t>(lengths[b], 0, a.T);
  }
  return rows * 10 >= a.T * a.B * 9;
}

}  // namespace

int64_t second_level_cache() {
  static const int64_t known = ask_system(2);
  static const int64_t bytes = std::clamp<int64_t>(known > 0 ? known : 1 << 20, 256 << 10, 4 << 20);
  return bytes;
}

int64_t third_level_cache() {
  static const int64_t bytes = ask_system(3);
  return bytes;
}

int64_t chunk_steps(const LayerArgs& a, int64_t row_bytes) {
  const int64_t rows = second_level_cache() / std::max<int64_t>(row_bytes, 1);
  return steps_of(a, std::clamp<int64_t>(rows, 128, 512));
}

bool joint_product(const LayerArgs& a, int64_t weight_bytes, bool tiles) {
  // The rows that hide where W comes from: the second level, the third, memory. Of tiles, W that a thread or
  // two find partly in the second level, and beyond.
  if (weight_bytes <= second_level_cache()) return a.B >= 2;
  if (tiles) return a.B >= (weight_bytes <= 4 * second_level_cache() ? 12 : 24);
  return a.B >= (weight_bytes <= third_level_cache() / 2 ? 3 : 8);
}

bool keeps_past_caches(int64_t bytes) { return bytes >= 2 * second_level_cache(); }

int64_t input_steps(const LayerArgs& a, int64_t columns, size_t element, bool tiles) {
  constexpr int64_t kTheirs = 128;                     // rows, that tiles need lest they wait for W
  const int64_t bytes = second_level_cache() / 8 * 3;  // W and R take the rest
  const int64_t rows = bytes / std::max<int64_t>((a.I + columns) * static_cast<int64_t>(element), 1);
  return steps_of(a, tiles ? std::max(rows, kTheirs) : rows);
}

int product_threads(int64_t multiplications) {
  const int64_t most = std::max<int64_t>(1, multiplications / Plan::kLeastCall);
  return static_cast<int>(std::min<int64_t>(team_threads(), most));
}

Plan::Plan(const LayerArgs& a, int64_t step, int64_t call, int64_t weight_bytes, int64_t blocks,
           int64_t least_call)
    : D_(a.D),
      T_(a.T),
      B_(a.B),
      I_(a.I),
      P_(a.P),
      even_(nearly_even(a)),
      step_(step),
      call_(call),
      weight_bytes_(weight_bytes),
      blocks_(blocks) {
  // A step shorter than its barrier, or a call shorter than waking a team, is better run alone.
  const int64_t most = std::max<int64_t>(1, std::min(a.D * step / kLeastStep, call / least_call));
  threads_ = static_cast<int>(std::min<int64_t>(team_threads(), most));
  // More parts of the units than vectors of them would have nothing to do but meet.
  while (threads_ > 1 && split(threads_).units > std::max<int64_t>(blocks_, 1)) --threads_;
}

Plan::Split Plan::split(int threads) const {
  constexpr int64_t kShort = 8;     // steps
  constexpr int64_t kRowsEach = 6;  // those of a register tile on x86-64
  const int directions = D_ > 1 && threads % D_ == 0 ? static_cast<int>(D_) : 1, each = threads / directions;
  const bool far = weight_bytes_ <= third_level_cache() / 4;
  if (T_ > kShort) {
    // As few parts of the units, and barriers, as leave R in the cache, beside what the steps read and write.
    // But of a ragged batch, sorted by length, the first rows are most of the work: as many as there may be.
    for (int i = 1; i <= each; ++i) {
      const int units = even_ ? i : each + 1 - i, rows = each / units;
      if (each % units != 0 || blocks_ < units) continue;
      const bool near = weight_bytes_ / units <= second_level_cache() * 3 / 5;
      if (rows == 1 || (near && B_ >= kRowsEach * rows) || (far && B_ >= rows_of_far() * rows)) {
        return {directions, rows, units};
      }
    }
  }
  return {directions, 1, each};
}

double Plan::step_time(int units, bool above) const {
  constexpr double kNear = 150, kFar = 66, kMultiplied = 80;  // bytes and multiplications in a nanosecond
  constexpr double kPhase = 900, kGates = 300;
  const double bytes = static_cast<double>(weight_bytes_) / units;
  const bool fits = weight_bytes_ / units <= second_level_cache() * 3 / 5;
  const double recurrent = std::max(bytes / (fits ? kNear : kFar), step_ / kMultiplied / units);
  const double input = step_ / kMultiplied / units * (above || P_ == 0 ? 1 : static_cast<double>(I_) / P_);
  return recurrent + input + kGates / units + (units > 1 ? kPhase : 0);
}

Plan::Wave Plan::wave(int64_t layers, int64_t cached) const {
  constexpr int64_t kLeastSteps = 8, kChunks = 16;
  constexpr double kMeeting = 900, kWaking = 4000;  // of all, in nanoseconds
  constexpr double kWorthwhile = 1.1;               // else the model's errors decide
  constexpr double kLeastSaved = 50000;
  // Of a chunk: few meetings, a short way for the first steps through all layers, and gx in the cache.
  const int64_t steps = std::clamp(ceil_div(T_, kChunks), kLeastSteps, std::max(cached, kLeastSteps));
  Wave best{1, 1, steps};
  const int64_t most = std::min<int64_t>(team_threads(), layers * call_ / kLeastCall);
  // Parts of the rows need no barrier that a wave could save.
  if (D_ > 1 || split(threads_).rows > 1) return best;
  const double waking = kWaking / static_cast<double>(T_);
  const double layer_by_layer = step_time(threads_, false) + (layers - 1) * step_time(threads_, true) +
                                (threads_ > 1 ? layers * waking : 0);
  double time = layer_by_layer / kWorthwhile;
  // Another thread is not woken for little: on a busy machine it may come milliseconds late.
  if (threads_ == 1) time = std::min(time, layer_by_layer - kLeastSaved / static_cast<double>(T_));
  const double chunks = static_cast<double>(ceil_div(T_, steps));
  for (int64_t groups = 2; groups <= std::min(layers, most); ++groups) {
    const int64_t parts =
        std::max<int64_t>(std::min({most / groups, std::max<int64_t>(step_ / kLeastStep, 1), blocks_}), 1);
    const int units = static_cast<int>(parts);
    double slowest = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = layers * group / groups, end = layers * (group + 1) / groups;
      slowest = std::max(slowest, (begin == 0 ? step_time(units, false) : step_time(units, true)) +
                                      (end - begin - 1) * step_time(units, true));
    }
    const double wave = (slowest + kMeeting / steps) * (chunks + groups - 1) / chunks + waking;
    if (wave < time) {
      time = wave;
      best = {static_cast<int>(groups), units, steps};
    }
  }
  return best;
}

Share Plan::share(const Team& team) const {
  Share s{};
  s.parts = 1;
  if (team.member >= threads_) return s;
  const Split parts = split(std::min(team.size, threads_));
  const int each = parts.rows * parts.units, index = team.member % each;
  const int direction = team.member / each, row = index / parts.units;
  s.dir0 = parts.directions > 1 ? direction : 0;
  s.dir1 = parts.directions > 1 ? direction + 1 : static_cast<int>(D_);
  s.row0 = B_ * row / parts.rows;
  s.row1 = B_ * (row + 1) / parts.rows;
  s.part = index % parts.units;
  s.parts = parts.units;
  s.places = team.group(team.member - s.part);
  return s;
}

}  // namespace fastrnn::cpu
