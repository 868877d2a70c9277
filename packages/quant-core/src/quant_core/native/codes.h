// Keys or values in pages: where they are, and what their codes mean.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "simd.h"

namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int64_t kTile = 128;          // tokens, row by row
constexpr int64_t kPart = 512;          // tokens of an item, row by row
constexpr int64_t kBlockTokens = 64;    // tokens of a step, in blocks
constexpr int64_t kBlockPart = 2048;    // tokens of an item, in blocks, if there are few rows
constexpr int64_t kBlockRows = 128;     // rows of an item, in blocks
constexpr int64_t kPanel = 2 * kWidth;  // rows that are multiplied at a time
constexpr int64_t kPad = 16;            // D is filled up to a multiple of it in scratch
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

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
  int64_t blocks, heads, block, size;               // size: D
  int64_t block_stride, head_stride, token_stride;  // in bytes
  const float* scale;                               // [heads, size]; null: 1
  const float* offset;                              // null: 0

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
    TORCH_CHECK(values->scalar_type() == at::kFloat && values->is_contiguous() && values->dim() == 2 &&
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

}  // namespace
