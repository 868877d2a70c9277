// Attention of several queries: some tokens become float32 in a scratch that stays in the cache, and are multiplied
// with two vectors of rows (query and head) at a time. Lanes are rows, so the softmax needs no sums across lanes.

#pragma once

#include "reading.h"

namespace {

#if defined(QUANT_CORE_AVX512)
constexpr int kAtOnce = 8;
#else
constexpr int kAtOnce = 4;
#endif

// out[i] (+)= sum over k of a(i, k) · b[k], for kAtOnce values of i; out and b are rows of a panel.
inline void multiply_panel(const float* a, int64_t a_i, int64_t a_k, const float* b, int64_t n, float* out, bool add) {
  Vec sums[kAtOnce][2];
  for (int i = 0; i < kAtOnce; ++i) {
    sums[i][0] = add ? Vec::load(out + i * kPanel) : Vec::zero();
    sums[i][1] = add ? Vec::load(out + i * kPanel + kWidth) : Vec::zero();
  }
  for (int64_t k = 0; k < n; ++k) {
    const Vec b0 = Vec::load(b + k * kPanel), b1 = Vec::load(b + k * kPanel + kWidth);
    for (int i = 0; i < kAtOnce; ++i) {
      const Vec x = Vec::all(a[i * a_i + k * a_k]);
      sums[i][0] = x.fma(b0, sums[i][0]);
      sums[i][1] = x.fma(b1, sums[i][1]);
    }
  }
  for (int i = 0; i < kAtOnce; ++i) {
    sums[i][0].store(out + i * kPanel);
    sums[i][1].store(out + i * kPanel + kWidth);
  }
}

// Codes minus offsets of n tokens as [kBlockTokens][padded] floats; 0 for what is not there.
void decode_block(const Places& places, const Item& item, int64_t token, int64_t n, int64_t padded, float* to) {
  const Codes& codes = places.codes;
  const uint8_t* rows[kBlockTokens];
  const bool nan = places.rows(token, n, rows);
  const float* offset = codes.offset == nullptr ? nullptr : codes.offset + item.head * codes.size;
  const bool vectors = codes.kind == Kind::kE4M3 && !nan && codes.size % kWidth == 0;
  for (int64_t i = 0; i < n; ++i) {
    float* row = to + i * padded;
    if (vectors) {
      for (int64_t d = 0; d < codes.size; d += kWidth) {
        (Vec::e4m3(rows[i] + d) * Vec::all(kE4M3Half) * Vec::all(kE4M3Half)).store(row + d);
      }
    } else {
      decode_row(codes.kind, rows[i], row, codes.size);
    }
    if (offset != nullptr) {
      for (int64_t d = 0; d < codes.size; ++d) {
        row[d] -= offset[d];
      }
    }
    std::fill(row + codes.size, row + padded, 0.0f);
  }
  std::fill(to + n * padded, to + kBlockTokens * padded, 0.0f);
}

// Scores [tokens][kPanel] become weights, sums so far are shrunk; lanes are rows.
void soften_panel(const Problem& p, const Item& item, int64_t token, int64_t n, const float* low, const float* high,
                  const float* slopes, const float* positions, float* scores, float* sums, int64_t out_size,
                  float* highest, float* total) {
  // Only where some row does not see some token are bounds looked at.
  const int64_t first = item.position + item.row / p.group, last = item.position + (item.row + item.rows - 1) / p.group;
  const bool bounds = (p.right >= 0 && token + n - 1 > first + p.right) || (p.left >= 0 && token < last - p.left);
  const Vec hidden = Vec::all(-kInfinity);
  for (int64_t r = 0; r < kPanel; r += kWidth) {
    const Vec from = Vec::load(low + r), to = Vec::load(high + r), before = Vec::load(highest + r);
    Vec top = before;
    for (int64_t t = 0; t < n; ++t) {
      const Vec place = Vec::all(static_cast<float>(token + t));
      Vec s = Vec::load(scores + t * kPanel + r);
      if (p.softcap > 0) {
        s = tanh(s / Vec::all(p.softcap)) * Vec::all(p.softcap);
      }
      if (!p.alibi.empty()) {
        s = (place - Vec::load(positions + r)).fma(Vec::load(slopes + r), s);
      }
      if (bounds) {
        s = place.inside(s, from, to, hidden);
      }
      s.store(scores + t * kPanel + r);
      top = top.max(s);
    }
    // A row that has seen nothing yet: any number will do instead of -infinity, whose difference is NaN.
    const Vec lowest = Vec::all(std::numeric_limits<float>::lowest());
    const Vec base = lowest.max(top);
    const Vec shrink = exp(lowest.max(before) - base);
    Vec sum = Vec::load(total + r) * shrink;
    for (int64_t t = 0; t < n; ++t) {
      const Vec w = exp(Vec::load(scores + t * kPanel + r) - base);
      w.store(scores + t * kPanel + r);
      sum = sum + w;
    }
    sum.store(total + r);
    top.store(highest + r);
    for (int64_t d = 0; d < out_size; ++d) {
      (Vec::load(sums + d * kPanel + r) * shrink).store(sums + d * kPanel + r);
    }
  }
}

void in_blocks(const Problem& p, const Item& item, Partials& parts) {
  const int64_t size = up(p.keys.size, kPad), out_size = up(p.values.size, kPad), rows = up(item.rows, kPanel);
  float* memory = scratch.floats(rows * (size + kBlockTokens + out_size + 6) + kBlockTokens * (size + out_size) +
                                 4 * std::max(size, out_size));
  // What has rows as lanes lies panel by panel: [panels][size or tokens][kPanel].
  float* queries = memory;
  float* scores = queries + size * rows;
  float* sums = scores + kBlockTokens * rows;
  float* keys = sums + out_size * rows;
  float* values = keys + kBlockTokens * size;
  float* four = values + kBlockTokens * out_size;  // four rows as they are
  float* low = four + 4 * std::max(size, out_size);
  float *high = low + rows, *slopes = high + rows, *positions = slopes + rows, *highest = positions + rows;
  float* total = highest + rows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = item.row + std::min(r, item.rows - 1), head = item.head * p.group + at % p.group;
    const int64_t position = item.position + at / p.group;
    positions[r] = static_cast<float>(position);
    low[r] = p.left >= 0 ? static_cast<float>(position - p.left) : -kInfinity;
    high[r] = p.right >= 0 ? static_cast<float>(position + p.right) : kInfinity;
    slopes[r] = p.alibi.empty() ? 0.0f : p.alibi[head];
    highest[r] = -kInfinity;
    total[r] = 0;
    float* row = four + r % 4 * size;
    std::fill(row, row + size, 0.0f);
    if (r < item.rows) {
      load_query(p, item.first_query + at / p.group, head, row);
      multiply(row, p.scale, p.keys.scales_of(item.head), p.keys.size);
    }
    if (r % 4 == 3) {
      transpose_4(four, size, size, queries + r / kPanel * size * kPanel + r % kPanel - 3, kPanel);
    }
  }
  std::fill(sums, sums + out_size * rows, 0.0f);
  const Places key_places(p, p.keys, item), value_places(p, p.values, item);
  for (int64_t token = item.token; token < item.stop; token += kBlockTokens) {
    const int64_t n = std::min(kBlockTokens, item.stop - token);
    decode_block(key_places, item, token, n, size, keys);
    decode_block(value_places, item, token, n, out_size, values);
    for (int64_t r = 0; r < rows; r += kPanel) {
      float *panel_scores = scores + r * kBlockTokens, *panel_sums = sums + r * out_size;
      for (int64_t t = 0; t < n; t += kAtOnce) {
        multiply_panel(keys + t * size, size, 1, queries + r * size, size, panel_scores + t * kPanel, false);
      }
      soften_panel(p, item, token, n, low + r, high + r, slopes + r, positions + r, panel_scores, panel_sums, out_size,
                   highest + r, total + r);
      for (int64_t d = 0; d < out_size; d += kAtOnce) {
        multiply_panel(values + d, 1, out_size, panel_scores, n, panel_sums + d * kPanel, true);
      }
    }
  }
  // Offsets have been subtracted already, and codes are not divided: undo what finish_row will do.
  const float shrink = 1.0f / p.values.unit();
  const float* offset = p.values.offsets_of(item.head);
  for (int64_t r = 0; r < item.rows; r += 4) {
    const float* panel = sums + r / kPanel * kPanel * out_size + r % kPanel;
    for (int64_t d = 0; d < out_size; d += 4) {
      transpose_4(panel + d * kPanel, kPanel, 4, four + d, out_size);
    }
    for (int64_t i = 0; i < 4 && r + i < item.rows; ++i) {
      float* row = four + i * out_size;
      if (offset != nullptr) {
        for (int64_t d = 0; d < p.values.size; ++d) {
          row[d] += offset[d] * total[r + i];
        }
      }
      if (shrink != 1.0f) {
        multiply(row, shrink, nullptr, p.values.size);
      }
      finish(p, item, item.row + r + i, highest[r + i], total[r + i], row, parts);
    }
  }
}

}  // namespace
