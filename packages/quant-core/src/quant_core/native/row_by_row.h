// Attention of one query: codes become float32 in registers and are multiplied by the queries of up to four heads that
// share them. Scales are multiplied into the query and the output.

#pragma once

#include <type_traits>

#include "reading.h"

namespace {

struct Int8Row {
  static Vec load(const uint8_t* row, int64_t d) { return Vec::int8(row + d); }
};
struct E4M3Row {
  static Vec load(const uint8_t* row, int64_t d) { return Vec::e4m3(row + d); }
};
struct FloatRow {
  static Vec load(const uint8_t* row, int64_t d) { return Vec::load(reinterpret_cast<const float*>(row) + d); }
};

#if defined(QUANT_CORE_AVX512)
constexpr int kTokensAtOnce = 4;

// The sums of 16 vectors; that of vector 4 h + t is element 4 h + t.
inline __m512 sums_of_16(const Vec (&v)[4][4]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {  // heads 0 and 1 with heads 2 and 3
    const __m512 x = v[i / 4][i % 4].v, y = v[2 + i / 4][i % 4].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  for (int i = 0; i < 4; ++i) {  // head 0 with 1: lanes of 128 bits are heads 0, 2, 1, 3
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd));
  }
  for (int i = 0; i < 2; ++i) {  // tokens 0 and 2, 1 and 3
    c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[2 + i]), _mm512_unpackhi_ps(b[i], b[2 + i]));
  }
  const __m512 d =
      _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x44), _mm512_shuffle_ps(c[0], c[1], 0xee));  // tokens 0, 2, 1, 3
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, d);
}
#else
constexpr int kTokensAtOnce = 2;
#endif

// Scores of kHeads queries [kHeads, size] with n rows. n is a multiple of kTokensAtOnce.
template <class Row, int kHeads>
void multiply_keys(const float* query, const uint8_t* const* rows, int64_t n, int64_t size, float* scores) {
  for (int64_t t = 0; t < n; t += kTokensAtOnce) {
    Vec sums[kHeads][kTokensAtOnce];
    for (auto& of_head : sums) {
      for (auto& one : of_head) {
        one = Vec::zero();
      }
    }
    for (int64_t d = 0; d < size; d += kWidth) {
      Vec keys[kTokensAtOnce];
      for (int i = 0; i < kTokensAtOnce; ++i) {
        keys[i] = Row::load(rows[t + i], d);
      }
      for (int h = 0; h < kHeads; ++h) {
        const Vec q = Vec::load(query + h * size + d);
        for (int i = 0; i < kTokensAtOnce; ++i) {
          sums[h][i] = q.fma(keys[i], sums[h][i]);
        }
      }
    }
#if defined(QUANT_CORE_AVX512)
    if constexpr (kHeads == 4) {
      const __m512 all = sums_of_16(sums);
      _mm_storeu_ps(scores + t, _mm512_castps512_ps128(all));
      _mm_storeu_ps(scores + kTile + t, _mm512_extractf32x4_ps(all, 1));
      _mm_storeu_ps(scores + 2 * kTile + t, _mm512_extractf32x4_ps(all, 2));
      _mm_storeu_ps(scores + 3 * kTile + t, _mm512_extractf32x4_ps(all, 3));
      continue;
    }
#endif
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kTokensAtOnce; ++i) {
        scores[h * kTile + t + i] = sums[h][i].sum();
      }
    }
  }
}

// Adds weights times n rows to kHeads outputs [kHeads, size], kVectors of each at a time.
template <class Row, int kHeads, int kVectors>
void multiply_values_from(const float* weights, const uint8_t* const* rows, int64_t n, int64_t size, int64_t d,
                          float* out) {
  Vec sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) {
      sums[h][i] = Vec::load(out + h * size + d + i * kWidth);
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    Vec values[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      values[i] = Row::load(rows[t], d + i * kWidth);
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = Vec::all(weights[h * kTile + t]);
      for (int i = 0; i < kVectors; ++i) {
        sums[h][i] = weight.fma(values[i], sums[h][i]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) {
      sums[h][i].store(out + h * size + d + i * kWidth);
    }
  }
}

template <class Row, int kHeads>
void multiply_values(const float* weights, const uint8_t* const* rows, int64_t n, int64_t size, float* out) {
  constexpr int kMost = kWidth == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kMost * kWidth <= size; d += kMost * kWidth) {
    multiply_values_from<Row, kHeads, kMost>(weights, rows, n, size, d, out);
  }
  for (; d < size; d += kWidth) {
    multiply_values_from<Row, kHeads, 1>(weights, rows, n, size, d, out);
  }
}

// Rows that vectors can read: those of the pages, or what was made of them in a buffer of n rows of `padded` floats.
struct Readable {
  Kind kind;  // kInt8, kE4M3 or kFloat

  Readable(const Codes& codes, bool nan, const uint8_t** rows, int64_t n, int64_t padded, float* buffer) {
    const bool direct = padded == codes.size && !nan &&
                        (codes.kind == Kind::kInt8 || codes.kind == Kind::kE4M3 || codes.kind == Kind::kFloat);
    kind = direct ? codes.kind : Kind::kFloat;
    if (direct) {
      return;
    }
    const float shrink = 1.0f / codes.unit();
    for (int64_t i = 0; i < n; ++i) {
      float* row = buffer + i * padded;
      decode_row(codes.kind, rows[i], row, codes.size);
      for (int64_t d = 0; d < codes.size; ++d) {
        row[d] = row[d] * shrink * shrink;
      }
      std::fill(row + codes.size, row + padded, 0.0f);
      rows[i] = reinterpret_cast<const uint8_t*>(row);
    }
  }
};

template <int kHeads>
void keys_of_heads(Kind kind, const float* query, const uint8_t* const* rows, int64_t n, int64_t size, float* scores) {
  switch (kind) {
    case Kind::kInt8:
      return multiply_keys<Int8Row, kHeads>(query, rows, n, size, scores);
    case Kind::kE4M3:
      return multiply_keys<E4M3Row, kHeads>(query, rows, n, size, scores);
    default:
      return multiply_keys<FloatRow, kHeads>(query, rows, n, size, scores);
  }
}

template <int kHeads>
void values_of_heads(Kind kind, const float* weights, const uint8_t* const* rows, int64_t n, int64_t size, float* out) {
  switch (kind) {
    case Kind::kInt8:
      return multiply_values<Int8Row, kHeads>(weights, rows, n, size, out);
    case Kind::kE4M3:
      return multiply_values<E4M3Row, kHeads>(weights, rows, n, size, out);
    default:
      return multiply_values<FloatRow, kHeads>(weights, rows, n, size, out);
  }
}

// Calls f with a constant of how many heads, up to four at a time, and the first of them.
template <class F>
void heads_at_once(int64_t heads, F f) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) {
    f(std::integral_constant<int, 4>(), h);
  }
  switch (heads - h) {
    case 3:
      return f(std::integral_constant<int, 3>(), h);
    case 2:
      return f(std::integral_constant<int, 2>(), h);
    case 1:
      return f(std::integral_constant<int, 1>(), h);
    default:
      return;
  }
}

// Scores of n tokens from `token` on become weights; the highest score so far and the sum of weights are brought up to
// date, and what the sums so far must be multiplied by is returned.
float soften(const Problem& p, float* scores, int64_t n, int64_t distance, float shift, int64_t head, float& highest,
             float& total) {
  const int64_t padded = up(n, kWidth);
  std::fill(scores + n, scores + padded, -kInfinity);
  if (shift != 0 || p.softcap > 0 || !p.alibi.empty() || p.keys.unit() != 1.0f) {
    const float slope = p.alibi.empty() ? 0.0f : p.alibi[head];
    alignas(64) float steps[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      steps[i] = static_cast<float>(i);
    }
    for (int64_t i = 0; i < n; i += kWidth) {
      Vec s = Vec::load(scores + i).fma(Vec::all(p.keys.unit()), Vec::all(-shift));
      if (p.softcap > 0) {
        s = tanh(s / Vec::all(p.softcap)) * Vec::all(p.softcap);
      }
      if (!p.alibi.empty()) {
        s = (Vec::load(steps) + Vec::all(static_cast<float>(distance + i))).fma(Vec::all(slope), s);
      }
      s.store(scores + i);
    }
    std::fill(scores + n, scores + padded, -kInfinity);
  }
  Vec top = Vec::all(highest);
  for (int64_t i = 0; i < padded; i += kWidth) {
    top = top.max(Vec::load(scores + i));
  }
  const float now = top.largest();
  if (now == -kInfinity) {
    std::fill(scores, scores + padded, 0.0f);
    return 1.0f;
  }
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Vec w = exp(Vec::load(scores + i) - Vec::all(now));
    (w * Vec::all(p.values.unit())).store(scores + i);
    sum = sum + w;
  }
  const float shrink = highest == now ? 1.0f : std::exp(highest - now);
  total = total * shrink + sum.sum();
  highest = now;
  return shrink;
}

// One query of all heads that share a key/value head.
void row_by_row(const Problem& p, const Item& item, Partials& parts) {
  const int64_t heads = item.rows, size = up(p.keys.size, kPad), out_size = up(p.values.size, kPad);
  const int64_t query = item.row / p.group;
  float* memory = scratch.floats(heads * (size + kTile + out_size + 4) + kTile * (size + out_size) + 64);
  float* q = memory;
  float* scores = q + heads * size;
  float* sums = scores + heads * kTile;
  float* buffer = sums + heads * out_size;
  float* value_buffer = buffer + kTile * size;
  float* shift = value_buffer + kTile * out_size;
  float* highest = shift + heads;
  float* total = highest + heads;
  const float* offset = p.keys.offsets_of(item.head);
  for (int64_t h = 0; h < heads; ++h) {
    float* row = q + h * size;
    load_query(p, item.first_query + query, item.head * p.group + h, row);
    std::fill(row + p.keys.size, row + size, 0.0f);
    multiply(row, p.scale, p.keys.scales_of(item.head), p.keys.size);
    shift[h] = offset == nullptr ? 0.0f : sum_of_products(row, offset, p.keys.size);
    if (p.keys.unit() != 1.0f) {
      multiply(row, p.keys.unit(), nullptr, p.keys.size);
    }
    highest[h] = -kInfinity;
    total[h] = 0;
  }
  std::fill(sums, sums + heads * out_size, 0.0f);
  const Places keys(p, p.keys, item), values(p, p.values, item);
  const uint8_t *key_rows[kTile + kTokensAtOnce], *value_rows[kTile];
  for (int64_t token = item.token; token < item.stop; token += kTile) {
    const int64_t n = std::min(kTile, item.stop - token);
    const bool key_nan = keys.rows(token, n, key_rows), value_nan = values.rows(token, n, value_rows);
    const Readable readable(p.keys, key_nan, key_rows, n, size, buffer);
    for (int64_t i = n; i < up(n, kTokensAtOnce); ++i) {
      key_rows[i] = key_rows[n - 1];
    }
    heads_at_once(heads, [&](auto count, int64_t h) {
      keys_of_heads<count>(readable.kind, q + h * size, key_rows, up(n, kTokensAtOnce), size, scores + h * kTile);
    });
    for (int64_t h = 0; h < heads; ++h) {
      const float shrink = soften(p, scores + h * kTile, n, token - item.position - query, shift[h],
                                  item.head * p.group + h, highest[h], total[h]);
      if (shrink != 1.0f) {
        for (int64_t d = 0; d < out_size; ++d) {
          sums[h * out_size + d] *= shrink;
        }
      }
    }
    const Readable readable_values(p.values, value_nan, value_rows, n, out_size, value_buffer);
    heads_at_once(heads, [&](auto count, int64_t h) {
      values_of_heads<count>(readable_values.kind, scores + h * kTile, value_rows, n, out_size, sums + h * out_size);
    });
  }
  for (int64_t h = 0; h < heads; ++h) {
    finish(p, item, item.row + h, highest[h], total[h], sums + h * out_size, parts);
  }
}

}  // namespace
