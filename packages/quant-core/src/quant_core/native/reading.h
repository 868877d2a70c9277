// Scratch of a thread, and where the tokens of a sequence are.

#pragma once

#include <memory>

#include "problem.h"

namespace {

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

}  // namespace
