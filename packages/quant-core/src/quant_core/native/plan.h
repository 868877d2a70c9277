// How attention is cut into items that threads take one after the other. How a sequence is cut depends on nothing but
// that sequence, so its result is the same bits alone, in a batch and on any number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <utility>
#include <vector>

#include "problem.h"

namespace {

// Several items that look at different tokens for the same rows.
struct Merge {
  Item item;
  int64_t first, count;  // partials: `count` times item.rows rows
};

struct Plan {
  std::vector<Item> items;
  std::vector<Merge> merges;
  int64_t partials = 0, cost = 0;
};

// The tokens that rows of these positions see.
std::pair<int64_t, int64_t> seen(const Problem& p, int64_t length, int64_t first, int64_t last) {
  const int64_t start = p.left >= 0 ? std::max<int64_t>(0, first - p.left) : 0;
  const int64_t stop = p.right >= 0 ? std::min(length, last + p.right + 1) : length;
  return {start, std::max(start, stop)};
}

void add_items(const Problem& p, Item item, int64_t length, int64_t part, Plan& plan) {
  const int64_t first = item.position + item.row / p.group, last = item.position + (item.row + item.rows - 1) / p.group;
  const auto [start, stop] = seen(p, length, first, last);
  const int64_t from = start / part, count = std::max<int64_t>(1, (stop + part - 1) / part - from);
  if (count > 1) {
    plan.merges.push_back({item, plan.partials, count});
  }
  for (int64_t i = 0; i < count; ++i) {
    item.token = std::max(start, (from + i) * part);
    item.stop = count == 1 ? stop : std::min(stop, (from + i + 1) * part);
    item.partial = count > 1 ? plan.partials : -1;
    item.cost = (item.stop - item.token + 16) * item.rows;
    plan.partials += count > 1 ? item.rows : 0;
    plan.cost += item.cost;
    plan.items.push_back(item);
  }
}

Plan make_plan(const Problem& p, const int32_t* starts, const int32_t* lengths, int64_t sequences) {
  Plan plan;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t queries = starts[b + 1] - starts[b], length = lengths[b];
    const int64_t rows = queries * p.group;
    const bool blocks = (queries > 1 && rows >= 8) || p.group > 16;
    for (int64_t head = 0; head < p.keys.heads && queries > 0; ++head) {
      Item item{b, head, starts[b], length - queries, 0, 0, 0, 0, -1, blocks, 0};
      const int64_t step = blocks ? kBlockRows : p.group;
      for (; item.row < rows; item.row += step) {
        item.rows = std::min(step, rows - item.row);
        const bool cut = rows <= kBlockRows;
        add_items(p, item, length, !blocks ? kPart : cut ? kBlockPart : std::numeric_limits<int32_t>::max(), plan);
      }
    }
  }
  std::stable_sort(plan.items.begin(), plan.items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return plan;
}

void merge(const Problem& p, const Merge& m, Partials& parts) {
  std::vector<float> sum(parts.size);
  for (int64_t r = 0; r < m.item.rows; ++r) {
    float highest = -kInfinity, total = 0;
    for (int64_t i = 0; i < m.count; ++i) {
      const float one = parts.highest[m.first + i * m.item.rows + r];
      highest = one > highest || std::isnan(one) ? one : highest;
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t i = 0; i < m.count; ++i) {
      const int64_t at = m.first + i * m.item.rows + r;
      if (parts.highest[at] == -kInfinity) {
        continue;
      }
      const float weight = std::exp(parts.highest[at] - highest);
      total += weight * parts.total[at];
      for (int64_t d = 0; d < p.values.size; ++d) {
        sum[d] += weight * parts.sum[at * parts.size + d];
      }
    }
    finish_row(p, m.item, m.item.row + r, highest, total, sum.data());
  }
}

// Threads take one after the other.
template <class F>
void each(int64_t count, bool parallel, F f) {
  if (!parallel || count < 2) {
    [[maybe_unused]] const Subnormals subnormals;
    for (int64_t i = 0; i < count; ++i) {
      f(i);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const Subnormals subnormals;
    for (int64_t i = next++; i < count; i = next++) {
      f(i);
    }
  });
}

}  // namespace
