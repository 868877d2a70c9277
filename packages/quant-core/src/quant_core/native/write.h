// Quantising keys and values, and writing them into pages.

#pragma once

#include "codes.h"

namespace {

inline void check_float(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, name,
              " is ", t.scalar_type());
  TORCH_CHECK(t.dim() == 3 && (t.stride(2) == 1 || t.size(2) == 1), name, " has sizes ", t.sizes(), " and strides ",
              t.strides());
}

void check_pages(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 4 && t.stride(3) == 1, "pages have sizes ", t.sizes(), " and strides ", t.strides());
}

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

}  // namespace
