// Writing keys and values into pages of 8 bits, and attention to them; what they compute is said in ops/pages.py.
//
// Attention is cut into items of a few queries and some tokens, which threads take one after the other. How a sequence
// is cut depends on nothing but that sequence, so its result is the same bits alone, in a batch and on any number of
// threads. There are two ways:
//
// * One query ("row by row"): codes become float32 in registers and are multiplied by the queries of up to four heads
//   that share them. Scales are multiplied into the query and the output.
// * Several queries ("in blocks"): some tokens become float32 in a scratch that stays in the cache, and are multiplied
//   with 32 rows (query and head) at a time, lanes being rows: softmax needs no sums across lanes.
//
// Everything is float32. No token at or behind a sequence's length is read: its code may be that of a NaN.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "simd.h"

namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int64_t kTile = 128;         // tokens, row by row
constexpr int64_t kPart = 512;         // tokens of an item, row by row
constexpr int64_t kBlockTokens = 64;   // tokens of a step, in blocks
constexpr int64_t kBlockPart = 2048;   // tokens of an item, in blocks, if there are few rows
constexpr int64_t kBlockRows = 128;    // rows of an item, in blocks
constexpr int64_t kPanel = 2 * kWidth; // rows that are multiplied at a time
constexpr int64_t kPad = 16;           // D is filled up to a multiple of it in scratch
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- what is attended to ----------------------------------------------------------------------------------------------

enum class Kind { kInt8, kE4M3, kFloat, kBFloat16, kHalf };

Kind kind_of(const at::Tensor& pages) {
  switch (pages.scalar_type()) {
    case at::kChar:
      return Kind::kInt8;
    case at::kFloat8_e4m3fn:
      return Kind::kE4M3;
    case at::kFloat:
      return Kind::kFloat;
    case at::kBFloat16:
      return Kind::kBFloat16;
    case at::kHalf:
      return Kind::kHalf;
    default:
      TORCH_CHECK(false, "there is no attention to pages of ", pages.scalar_type());
  }
}

// Keys or values of all heads.
struct Codes {
  const uint8_t* data;
  Kind kind;
  int64_t blocks, heads, block, size;          // size: D
  int64_t block_stride, head_stride, token_stride;  // in bytes
  const float* scale;                          // [heads, size]; null: 1
  const float* offset;                         // null: 0

  Codes(const at::Tensor& pages, const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& offsets)
      : data(static_cast<const uint8_t*>(pages.const_data_ptr())),
        kind(kind_of(pages)),
        blocks(pages.size(0)),
        heads(pages.size(1)),
        block(pages.size(2)),
        size(pages.size(3)),
        block_stride(pages.stride(0) * pages.element_size()),
        head_stride(pages.stride(1) * pages.element_size()),
        token_stride(pages.stride(2) * pages.element_size()),
        scale(values_of(scales, pages)),
        offset(values_of(offsets, pages)) {}

  static const float* values_of(const std::optional<at::Tensor>& values, const at::Tensor& pages) {
    if (!values.has_value()) {
      return nullptr;
    }
    TORCH_CHECK(
        values->scalar_type() == at::kFloat && values->is_contiguous() && values->dim() == 2 &&
            values->size(0) == pages.size(1) && values->size(1) == pages.size(3),
        "scales and offsets must be contiguous float32 [", pages.size(1), ", ", pages.size(3), "], these are ",
        values->sizes(), " ", values->scalar_type());
    return values->const_data_ptr<float>();
  }

  const float* scales_of(int64_t head) const { return scale == nullptr ? nullptr : scale + head * size; }
  const float* offsets_of(int64_t head) const { return offset == nullptr ? nullptr : offset + head * size; }

  // What vectors of these codes must be multiplied by twice to be the codes.
  float unit() const { return kind == Kind::kE4M3 ? kE4M3Half : 1.0f; }
};

template <class T>
void convert(const uint8_t* row, float* to, int64_t n) {
  to_float(reinterpret_cast<const T*>(row), to, n);
}

// The codes of a row as float32, whatever they are.
void decode_row(Kind kind, const uint8_t* row, float* to, int64_t n) {
  int64_t i = 0;
  switch (kind) {
    case Kind::kInt8:
      for (; i + kWidth <= n; i += kWidth) {
        Vec::int8(row + i).store(to + i);
      }
      for (; i < n; ++i) {
        to[i] = static_cast<float>(static_cast<int8_t>(row[i]));
      }
      break;
    case Kind::kE4M3:
      for (; i < n; ++i) {
        to[i] = e4m3_to_float(row[i]);
      }
      break;
    case Kind::kFloat:
      convert<float>(row, to, n);
      break;
    case Kind::kBFloat16:
      convert<c10::BFloat16>(row, to, n);
      break;
    case Kind::kHalf:
      convert<c10::Half>(row, to, n);
      break;
  }
}

bool has_nan(const uint8_t* codes, int64_t n) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, static_cast<uint8_t>(codes[i] & 0x7f));
  }
  return largest == 0x7f;
}

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

// Some rows of a sequence and a head, and the tokens that they attend to here. Row r is query r / group, head r % group.
struct Item {
  int64_t sequence, head;
  int64_t first_query;      // in the batch, of the sequence
  int64_t position;         // of that query in its sequence
  int64_t row, rows;
  int64_t token, stop;      // what is looked at
  int64_t partial;          // where the result goes if others look at other tokens; -1: it is the output
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

// tanh with an error of a few units in the last place
inline Vec tanh(Vec x) {
  const Vec one = Vec::all(1.0f), magnitude = x.max(Vec::zero() - x);
  const Vec e = exp(Vec::all(-2.0f) * magnitude);
  const Vec large = (one - e) / (one + e);
  const Vec z = x * x;
  Vec small = Vec::all(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    small = small.fma(z, Vec::all(c));
  }
  small = (small * z).fma(x, x);
  const Vec limit = Vec::all(0.625f), all = Vec::all(kInfinity);
  const Vec positive = x.inside(large, Vec::zero(), all, Vec::zero() - large);
  return x.inside(small, Vec::zero() - limit, limit, positive);
}

// --- row by row -------------------------------------------------------------------------------------------------------

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
  const __m512 d = _mm512_add_ps(
      _mm512_shuffle_ps(c[0], c[1], 0x44), _mm512_shuffle_ps(c[0], c[1], 0xee));  // tokens 0, 2, 1, 3
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
void multiply_values_from(
    const float* weights, const uint8_t* const* rows, int64_t n, int64_t size, int64_t d, float* out) {
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

// Scratch of a thread.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;

  float* floats(int64_t wanted) {
    if (wanted > size) {
      memory.reset(new float[wanted + 16]);
      size = wanted;
    }
    // whole cache lines
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (up(static_cast<int64_t>(address), 64) - static_cast<int64_t>(address)) / 4;
  }
};

thread_local Scratch scratch;

// Where tokens are.
struct Places {
  const Codes& codes;
  const int32_t* table;
  const uint8_t* head;

  Places(const Problem& p, const Codes& c, const Item& item)
      : codes(c), table(p.table + item.sequence * p.table_stride), head(c.data + item.head * c.head_stride) {}

  // Addresses of some tokens; whether one of them holds a NaN that vectors do not see.
  bool rows(int64_t token, int64_t n, const uint8_t** to) const {
    bool nan = false;
    for (int64_t i = 0; i < n;) {
      const int64_t place = (token + i) % codes.block, run = std::min(n - i, codes.block - place);
      const uint8_t* row = head + table[(token + i) / codes.block] * codes.block_stride + place * codes.token_stride;
      if (codes.kind == Kind::kE4M3) {
        if (codes.token_stride == codes.size) {
          nan |= has_nan(row, run * codes.size);
        } else {
          for (int64_t j = 0; j < run; ++j) {
            nan |= has_nan(row + j * codes.token_stride, codes.size);
          }
        }
      }
      for (int64_t j = 0; j < run; ++j, ++i) {
        to[i] = row + j * codes.token_stride;
      }
    }
    return nan;
  }
};

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
float soften(const Problem& p, float* scores, int64_t n, int64_t distance, float shift, int64_t head, float& highest, float& total) {
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
      const float shrink = soften(
          p, scores + h * kTile, n, token - item.position - query, shift[h], item.head * p.group + h, highest[h], total[h]);
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

// --- in blocks --------------------------------------------------------------------------------------------------------

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
void soften_panel(
    const Problem& p, const Item& item, int64_t token, int64_t n, const float* low, const float* high, const float* slopes,
    const float* positions, float* scores, float* sums, int64_t out_size, float* highest, float* total) {
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
  float* memory = scratch.floats(
      rows * (size + kBlockTokens + out_size + 6) + kBlockTokens * (size + out_size) + 4 * std::max(size, out_size));
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
      soften_panel(
          p, item, token, n, low + r, high + r, slopes + r, positions + r, panel_scores, panel_sums, out_size, highest + r,
          total + r);
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

// --- items ------------------------------------------------------------------------------------------------------------

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

void check_float(const at::Tensor& t, const char* name) {
  TORCH_CHECK(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, name, " is ",
      t.scalar_type());
  TORCH_CHECK(t.dim() == 3 && (t.stride(2) == 1 || t.size(2) == 1), name, " has sizes ", t.sizes(), " and strides ", t.strides());
}

void check_pages(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 4 && t.stride(3) == 1, "pages have sizes ", t.sizes(), " and strides ", t.strides());
}

std::vector<float> floats_of(const std::optional<at::Tensor>& values, int64_t heads) {
  if (!values.has_value()) {
    return {};
  }
  const at::Tensor all = values->to(at::kFloat).contiguous();
  TORCH_CHECK(all.numel() == heads, "there are ", all.numel(), " sinks or slopes for ", heads, " heads");
  return {all.const_data_ptr<float>(), all.const_data_ptr<float>() + heads};
}

void check_blocks(const Problem& p, const at::Tensor& table, const int32_t* lengths, const int32_t* starts) {
  for (int64_t b = 0; b < table.size(0); ++b) {
    TORCH_CHECK(starts[b + 1] >= starts[b], "query_start must not fall");
    const int64_t queries = starts[b + 1] - starts[b], used = (lengths[b] + p.keys.block - 1) / p.keys.block;
    if (queries == 0) {
      continue;
    }
    TORCH_CHECK(used <= table.size(1), "sequence ", b, " has ", lengths[b], " tokens, more than its blocks hold");
    const int64_t first = seen(p, lengths[b], lengths[b] - queries, lengths[b] - 1).first / p.keys.block;
    for (int64_t i = first; i < used; ++i) {
      const int32_t block = p.table[b * p.table_stride + i];
      TORCH_CHECK(block >= 0 && block < p.keys.blocks, "block ", block, " of ", p.keys.blocks, " in the table");
    }
  }
}

void attend(
    const at::Tensor& query, const at::Tensor& key_pages, const at::Tensor& value_pages,
    const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& k_offset,
    const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& v_offset, const at::Tensor& block_table,
    const at::Tensor& query_start, const at::Tensor& seq_lens, double scale, int64_t left, int64_t right, double softcap,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& alibi, at::Tensor& out,
    const std::optional<at::Tensor>& lse) {
  check_float(query, "query");
  check_float(out, "out");
  check_pages(key_pages);
  check_pages(value_pages);
  for (const at::Tensor* t : {&block_table, &query_start, &seq_lens}) {
    TORCH_CHECK(t->scalar_type() == at::kInt, "block_table, query_start and seq_lens must be int32");
    TORCH_CHECK(t->numel() < 2 || t->stride(-1) == 1, "block_table, query_start and seq_lens must be contiguous");
  }
  const int64_t heads = query.size(1), sequences = seq_lens.numel();
  TORCH_CHECK(
      key_pages.size(0) == value_pages.size(0) && key_pages.size(1) == value_pages.size(1) &&
          key_pages.size(2) == value_pages.size(2) && query.size(2) == key_pages.size(3) &&
          heads % key_pages.size(1) == 0 && out.size(0) >= query.size(0) && out.size(1) == heads &&
          out.size(2) == value_pages.size(3) && query_start.numel() == sequences + 1 && block_table.dim() == 2 &&
          block_table.size(0) == sequences,
      "sizes do not fit: query ", query.sizes(), ", pages ", key_pages.sizes(), " and ", value_pages.sizes(), ", out ",
      out.sizes(), ", block table ", block_table.sizes(), ", query_start ", query_start.sizes(), ", seq_lens ", seq_lens.sizes());
  Problem p{
      static_cast<const uint8_t*>(query.const_data_ptr()), query.scalar_type(), query.stride(0), query.stride(1),
      Codes(key_pages, k_scale, k_offset), Codes(value_pages, v_scale, v_offset), block_table.const_data_ptr<int32_t>(),
      block_table.stride(0), static_cast<float>(scale), left, right, static_cast<float>(softcap),
      floats_of(sinks, heads), floats_of(alibi, heads), static_cast<uint8_t*>(out.mutable_data_ptr()), out.scalar_type(),
      out.stride(0), out.stride(1), nullptr, 0, 0, heads / key_pages.size(1)};
  if (lse.has_value()) {
    TORCH_CHECK(lse->scalar_type() == at::kFloat && lse->dim() == 2 && lse->size(1) == heads, "lse must be float32 [T, heads]");
    p.lse = lse->mutable_data_ptr<float>();
    p.lse_token_stride = lse->stride(0);
    p.lse_head_stride = lse->stride(1);
  }
  const int32_t* starts = query_start.const_data_ptr<int32_t>();
  const int32_t* lengths = seq_lens.const_data_ptr<int32_t>();
  if (sequences == 0) {
    return;
  }
  TORCH_CHECK(starts[0] >= 0 && starts[sequences] <= query.size(0), "query_start counts more queries than there are");
  check_blocks(p, block_table, lengths, starts);
  Plan plan = make_plan(p, starts, lengths, sequences);
  Partials parts;
  parts.size = up(p.values.size, kPad);
  parts.highest.resize(plan.partials);
  parts.total.resize(plan.partials);
  parts.sum.resize(plan.partials * parts.size);
  const bool parallel = plan.cost * p.keys.size > 100000;
  each(static_cast<int64_t>(plan.items.size()), parallel, [&](int64_t i) {
    const Item& item = plan.items[i];
    item.blocks ? in_blocks(p, item, parts) : row_by_row(p, item, parts);
  });
  each(static_cast<int64_t>(plan.merges.size()), parallel && plan.merges.size() > 64, [&](int64_t i) {
    merge(p, plan.merges[i], parts);
  });
}

// --- writing ----------------------------------------------------------------------------------------------------------

inline uint8_t int8_code(float x) {
  x = std::isnan(x) ? 0.0f : std::min(std::max(x, -128.0f), 127.0f);
  // Adding 1.5 · 2^23 rounds to nearest, ties to even, and leaves the integer in the low bits.
  return static_cast<uint8_t>(float_to_bits(x + 12582912.0f));
}

inline uint8_t e4m3_code(float x) {
  const uint32_t sign = (float_to_bits(x) >> 24) & 0x80;
  const float magnitude = std::min(std::fabs(x), 448.0f);
  const uint32_t bits = float_to_bits(magnitude);
  // Below 2^-6 codes are multiples of 2^-9, which is the last place of 2^14.
  const uint32_t small = float_to_bits(magnitude + 16384.0f) - float_to_bits(16384.0f);
  const uint32_t normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120u << 3);
  const uint32_t code = magnitude < 0x1p-6f ? small : normal;
  return static_cast<uint8_t>(sign | (std::isnan(x) ? 0x7f : code));
}

template <bool kFP8>
void codes_of_row(const float* x, const float* scale, const float* offset, int64_t n, uint8_t* to) {
  if (offset == nullptr) {  // nothing is added to -0.0, which has a code of its own in FP8
    for (int64_t i = 0; i < n; ++i) {
      const float scaled = x[i] / scale[i];
      to[i] = kFP8 ? e4m3_code(scaled) : int8_code(scaled);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = x[i] / scale[i] + offset[i];
    to[i] = kFP8 ? e4m3_code(scaled) : int8_code(scaled);
  }
}

struct Target {
  const at::Tensor& rows;
  uint8_t* pages;
  bool fp8;
  int64_t block, heads, size, block_stride, head_stride, token_stride;
  const float* scale;
  const float* offset;

  Target(const at::Tensor& r, at::Tensor& p, const at::Tensor& s, const std::optional<at::Tensor>& o)
      : rows(r),
        pages(static_cast<uint8_t*>(p.mutable_data_ptr())),
        fp8(p.scalar_type() == at::kFloat8_e4m3fn),
        block(p.size(2)),
        heads(p.size(1)),
        size(p.size(3)),
        block_stride(p.stride(0)),
        head_stride(p.stride(1)),
        token_stride(p.stride(2)),
        scale(Codes::values_of(s, p)),
        offset(Codes::values_of(o, p)) {
    TORCH_CHECK(fp8 || p.scalar_type() == at::kChar, "there is no writing to pages of ", p.scalar_type());
    check_float(r, "keys or values");
    TORCH_CHECK(r.size(1) == heads && r.size(2) == size, "sizes do not fit: ", r.sizes(), " and pages ", p.sizes());
  }

  template <class T>
  void write_as(int64_t token, int64_t slot) const {
    const T* from = static_cast<const T*>(rows.const_data_ptr()) + token * rows.stride(0);
    uint8_t* page = pages + slot / block * block_stride + slot % block * token_stride;
    constexpr int64_t kChunk = 256;
    float x[kChunk];
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t d = 0; d < size; d += kChunk) {
        const int64_t n = std::min(kChunk, size - d), at = head * size + d;
        to_float(from + head * rows.stride(1) + d, x, n);
        uint8_t* to = page + head * head_stride + d;
        const float* o = offset == nullptr ? nullptr : offset + at;
        fp8 ? codes_of_row<true>(x, scale + at, o, n, to) : codes_of_row<false>(x, scale + at, o, n, to);
      }
    }
  }

  void write(int64_t token, int64_t slot) const {
    switch (rows.scalar_type()) {
      case at::kFloat:
        return write_as<float>(token, slot);
      case at::kBFloat16:
        return write_as<c10::BFloat16>(token, slot);
      default:
        return write_as<c10::Half>(token, slot);
    }
  }
};

void quantize_to_pages(
    const at::Tensor& key, const at::Tensor& value, at::Tensor& key_pages, at::Tensor& value_pages,
    const at::Tensor& k_scale, const std::optional<at::Tensor>& k_offset, const at::Tensor& v_scale,
    const std::optional<at::Tensor>& v_offset, const at::Tensor& slots) {
  check_pages(key_pages);
  check_pages(value_pages);
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous(), "slots must be contiguous int64");
  const Target keys(key, key_pages, k_scale, k_offset), values(value, value_pages, v_scale, v_offset);
  const int64_t tokens = slots.numel(), most = key_pages.size(0) * key_pages.size(2);
  TORCH_CHECK(key.size(0) >= tokens && value.size(0) >= tokens, "there are ", tokens, " slots for ", key.size(0), " tokens");
  TORCH_CHECK(
      key_pages.size(0) == value_pages.size(0) && key_pages.size(2) == value_pages.size(2), "pages do not fit: ",
      key_pages.sizes(), " and ", value_pages.sizes());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens; ++i) {
    TORCH_CHECK_INDEX(slot[i] < most, "slot ", slot[i], " of ", most);
  }
  at::parallel_for(0, tokens, 16, [&](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) {
      if (slot[i] >= 0) {
        keys.write(i, slot[i]);
        values.write(i, slot[i]);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY(quant_core_native, m) {
  m.def(
      "quantize_to_pages(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor k_scale, "
      "Tensor? k_offset, Tensor v_scale, Tensor? v_offset, Tensor slots) -> ()");
  m.def(
      "attend(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? k_scale, Tensor? k_offset, Tensor? v_scale, "
      "Tensor? v_offset, Tensor block_table, Tensor query_start, Tensor seq_lens, float scale, int left, int right, "
      "float softcap, Tensor? sinks, Tensor? alibi, Tensor(a!) out, Tensor(b!)? lse) -> ()");
}

TORCH_LIBRARY_IMPL(quant_core_native, CPU, m) {
  m.impl("quantize_to_pages", &quantize_to_pages);
  m.impl("attend", &attend);
}
