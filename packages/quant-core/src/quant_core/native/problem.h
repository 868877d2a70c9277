// What is attended to, and the parts that threads take; how a query comes in and a result goes out.

#pragma once

#include <vector>

#include "codes.h"

namespace {

struct Problem {
  const uint8_t* query;
  at::ScalarType query_type;
  int64_t query_token_stride, query_head_stride;  // in elements
  Codes keys, values;
  const int32_t* table;
  int64_t table_stride;
  float scale;
  int64_t left, right;  // how far a query sees, -1: everything
  float softcap;
  std::vector<float> sinks, alibi;
  uint8_t* out;
  at::ScalarType out_type;
  int64_t out_token_stride, out_head_stride;
  float* lse;  // null: not wanted
  int64_t lse_token_stride, lse_head_stride;
  int64_t group;  // query heads of a key/value head
};

// Some rows of a sequence and a head, and the tokens that they attend to here. Row r is query r / group, head r %
// group.
struct Item {
  int64_t sequence, head;
  int64_t first_query;  // in the batch, of the sequence
  int64_t position;     // of that query in its sequence
  int64_t row, rows;
  int64_t token, stop;  // what is looked at
  int64_t partial;      // where the result goes if others look at other tokens; -1: it is the output
  bool blocks;
  int64_t cost;
};

// Results of parts of a sequence: for each row the highest score, the sum of weights, and the weighted sum of values.
struct Partials {
  std::vector<float> highest, total, sum;
  int64_t size;
};

// Multiplies by a factor, and by what each place has of its own if there is such.
void multiply(float* values, float factor, const float* each, int64_t n) {
  if (each == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      values[i] *= factor;
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    values[i] = values[i] * factor * each[i];
  }
}

float sum_of_products(const float* a, const float* b, int64_t n) {
  Vec sum = Vec::zero();
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    sum = Vec::load(a + i).fma(Vec::load(b + i), sum);
  }
  float rest = sum.sum();
  for (; i < n; ++i) {
    rest += a[i] * b[i];
  }
  return rest;
}

void load_query(const Problem& p, int64_t token, int64_t head, float* to) {
  const int64_t at = token * p.query_token_stride + head * p.query_head_stride;
  switch (p.query_type) {
    case at::kFloat:
      return to_float(reinterpret_cast<const float*>(p.query) + at, to, p.keys.size);
    case at::kBFloat16:
      return to_float(reinterpret_cast<const c10::BFloat16*>(p.query) + at, to, p.keys.size);
    default:
      return to_float(reinterpret_cast<const c10::Half*>(p.query) + at, to, p.keys.size);
  }
}

void store_output(const Problem& p, int64_t token, int64_t head, const float* from) {
  const int64_t at = token * p.out_token_stride + head * p.out_head_stride, n = p.values.size;
  switch (p.out_type) {
    case at::kFloat:
      return from_float(from, reinterpret_cast<float*>(p.out) + at, n);
    case at::kBFloat16:
      return from_float(from, reinterpret_cast<c10::BFloat16*>(p.out) + at, n);
    default:
      return from_float(from, reinterpret_cast<c10::Half*>(p.out) + at, n);
  }
}

// The end of a row: the sink joins, and the sum of codes becomes a mean of values.
void finish_row(const Problem& p, const Item& item, int64_t row, float highest, float total, float* sum) {
  const int64_t token = item.first_query + row / p.group, head = item.head * p.group + row % p.group;
  float all = total, top = highest;
  if (!p.sinks.empty()) {
    top = std::max(highest, p.sinks[head]);
    const float shrink = highest == -kInfinity ? 0.0f : std::exp(highest - top);
    all = total * shrink + std::exp(p.sinks[head] - top);
    total *= shrink;
    for (int64_t d = 0; d < p.values.size; ++d) {
      sum[d] *= shrink;
    }
  }
  const float each = all > 0 || std::isnan(all) ? 1.0f / all : 0.0f;
  const float unit = p.values.unit();
  if (const float* offset = p.values.offsets_of(item.head)) {
    for (int64_t d = 0; d < p.values.size; ++d) {
      sum[d] = sum[d] * unit - offset[d] * total;
    }
    multiply(sum, each, p.values.scales_of(item.head), p.values.size);
  } else {
    multiply(sum, each * unit, p.values.scales_of(item.head), p.values.size);
  }
  store_output(p, token, head, sum);
  if (p.lse != nullptr) {
    p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = all > 0 ? top + std::log(all) : -kInfinity;
  }
}

void finish(const Problem& p, const Item& item, int64_t row, float highest, float total, float* sum, Partials& parts) {
  if (item.partial < 0) {
    return finish_row(p, item, row, highest, total, sum);
  }
  const int64_t at = item.partial + (row - item.row);
  parts.highest[at] = highest;
  parts.total[at] = total;
  std::copy(sum, sum + p.values.size, parts.sum.begin() + at * parts.size);
}

}  // namespace
