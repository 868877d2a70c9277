// Writing keys and values into pages of 8 bits, and attention to them; what they compute is said in ops/pages.py.
//
// Everything is float32. No token at or behind a sequence's length is read: its code may be that of a NaN.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "in_blocks.h"
#include "plan.h"
#include "row_by_row.h"
#include "write.h"

namespace {

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

void attend(const at::Tensor& query, const at::Tensor& key_pages, const at::Tensor& value_pages,
            const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& k_offset,
            const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& v_offset,
            const at::Tensor& block_table, const at::Tensor& query_start, const at::Tensor& seq_lens, double scale,
            int64_t left, int64_t right, double softcap, const std::optional<at::Tensor>& sinks,
            const std::optional<at::Tensor>& alibi, at::Tensor& out, const std::optional<at::Tensor>& lse) {
  check_float(query, "query");
  check_float(out, "out");
  check_pages(key_pages);
  check_pages(value_pages);
  for (const at::Tensor* t : {&block_table, &query_start, &seq_lens}) {
    TORCH_CHECK(t->scalar_type() == at::kInt, "block_table, query_start and seq_lens must be int32");
    TORCH_CHECK(t->numel() < 2 || t->stride(-1) == 1, "block_table, query_start and seq_lens must be contiguous");
  }
  const int64_t heads = query.size(1), sequences = seq_lens.numel();
  TORCH_CHECK(key_pages.size(0) == value_pages.size(0) && key_pages.size(1) == value_pages.size(1) &&
                  key_pages.size(2) == value_pages.size(2) && query.size(2) == key_pages.size(3) &&
                  heads % key_pages.size(1) == 0 && out.size(0) >= query.size(0) && out.size(1) == heads &&
                  out.size(2) == value_pages.size(3) && query_start.numel() == sequences + 1 &&
                  block_table.dim() == 2 && block_table.size(0) == sequences,
              "sizes do not fit: query ", query.sizes(), ", pages ", key_pages.sizes(), " and ", value_pages.sizes(),
              ", out ", out.sizes(), ", block table ", block_table.sizes(), ", query_start ", query_start.sizes(),
              ", seq_lens ", seq_lens.sizes());
  Problem p{static_cast<const uint8_t*>(query.const_data_ptr()),
            query.scalar_type(),
            query.stride(0),
            query.stride(1),
            Codes(key_pages, k_scale, k_offset),
            Codes(value_pages, v_scale, v_offset),
            block_table.const_data_ptr<int32_t>(),
            block_table.stride(0),
            static_cast<float>(scale),
            left,
            right,
            static_cast<float>(softcap),
            floats_of(sinks, heads),
            floats_of(alibi, heads),
            static_cast<uint8_t*>(out.mutable_data_ptr()),
            out.scalar_type(),
            out.stride(0),
            out.stride(1),
            nullptr,
            0,
            0,
            heads / key_pages.size(1)};
  if (lse.has_value()) {
    TORCH_CHECK(lse->scalar_type() == at::kFloat && lse->dim() == 2 && lse->size(1) == heads,
                "lse must be float32 [T, heads]");
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
  each(static_cast<int64_t>(plan.merges.size()), parallel && plan.merges.size() > 64,
       [&](int64_t i) { merge(p, plan.merges[i], parts); });
}

void quantize_to_pages(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_pages, at::Tensor& value_pages,
                       const at::Tensor& k_scale, const std::optional<at::Tensor>& k_offset, const at::Tensor& v_scale,
                       const std::optional<at::Tensor>& v_offset, const at::Tensor& slots) {
  check_pages(key_pages);
  check_pages(value_pages);
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous(), "slots must be contiguous int64");
  const Target keys(key, key_pages, k_scale, k_offset), values(value, value_pages, v_scale, v_offset);
  const int64_t tokens = slots.numel(), most = key_pages.size(0) * key_pages.size(2);
  TORCH_CHECK(key.size(0) >= tokens && value.size(0) >= tokens, "there are ", tokens, " slots for ", key.size(0),
              " tokens");
  TORCH_CHECK(key_pages.size(0) == value_pages.size(0) && key_pages.size(2) == value_pages.size(2),
              "pages do not fit: ", key_pages.sizes(), " and ", value_pages.sizes());
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
