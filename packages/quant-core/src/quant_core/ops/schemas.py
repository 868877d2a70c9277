"""The operators that schemes call, in torch_npu 2.13's own schemas.

Where torch_npu is installed these are only the names for which CPU kernels are added; elsewhere they are defined.
"""

SCHEMAS: dict[str, str] = {
    "npu_quantize": (
        "(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, bool div_mode=True) -> Tensor"
    ),
    "npu_dynamic_quant": (
        "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
        'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)'
    ),
    "npu_dynamic_quant_asymmetric": (
        "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
        'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor, Tensor)'
    ),
    "npu_quant_matmul": (
        "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? bias=None, "
        "int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, int? pertoken_scale_dtype=None, "
        "int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor"
    ),
    "npu_trans_quant_param": "(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
    "npu_weight_quant_batchmatmul": (
        "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, Tensor? quant_scale=None, "
        "Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, "
        "int? weight_dtype=None) -> Tensor"
    ),
    "npu_format_cast": (
        "(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor"
    ),
    "npu_convert_weight_to_int4pack": "(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_kronecker_quant": (
        "(Tensor x, Tensor kronecker_p1, Tensor kronecker_p2, float? clip_ratio=None, int? dst_dtype=None, "
        "float? dst_type_max=None) -> (Tensor out, Tensor quant_scale)"
    ),
    "npu_dynamic_mx_quant": (
        '(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, int block_size=32, int? scale_alg=0, '
        "float dst_type_max=0., float max_low_bound=0.) -> (Tensor, Tensor)"
    ),
    "npu_dynamic_dual_level_mx_quant": (
        '(Tensor input, *, Tensor? smooth_scale=None, str round_mode="rint") -> (Tensor, Tensor, Tensor)'
    ),
    "npu_dual_level_quant_matmul": (
        "(Tensor x1, Tensor x2, Tensor x1_level0_scale, Tensor x2_level0_scale, Tensor x1_level1_scale, "
        "Tensor x2_level1_scale, *, Tensor? bias=None, int output_dtype=15) -> Tensor"
    ),
    "npu_moe_init_routing_v2": (
        "(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, int "
        "expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, bool "
        "expert_tokens_num_flag=False, int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, int? "
        "x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "npu_moe_token_permute": (
        "(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False) -> (Tensor, Tensor)"
    ),
    "npu_moe_token_unpermute": (
        "(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, bool padded_mode=False, int[]? "
        "restore_shape=None) -> Tensor"
    ),
    "npu_moe_finalize_routing": (
        "(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, Tensor? scales, Tensor "
        "expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor"
    ),
    "npu_moe_gating_top_k_softmax": "(Tensor x, Tensor? finished=None, int k=1) -> (Tensor, Tensor, Tensor)",
    "npu_moe_gating_top_k": (
        "(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, int k_group=1, int "
        "group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, bool out_flag=False, float "
        "routed_scaling_factor=1., float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)"
    ),
    "npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu_clipped_swiglu": (
        "(Tensor x, *, Tensor? group_index=None, int dim=-1, float alpha=1.702, float limit=7., float bias=1., bool "
        "interleaved=True) -> Tensor"
    ),
    "npu_dequant_swiglu_quant": (
        "(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, Tensor? "
        "quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, int "
        "quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, int swiglu_mode=0, float "
        "clamp_limit=7., float glu_alpha=1.702, float glu_bias=1.) -> (Tensor, Tensor)"
    ),
    "npu_grouped_matmul": (
        "(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? "
        "antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, Tensor? "
        "group_list=None, Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, Tensor[]? "
        "activation_quant_offset=None, int? split_item=0, int? group_type=None, int? group_list_type=0, int? "
        "act_type=0, int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, "
        "int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]"
    ),
    "npu_grouped_matmul.List": (
        "(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? "
        "antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, int[]? "
        "group_list=None, Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, Tensor[]? "
        "activation_quant_offset=None, int? split_item=0, int? group_type=None, int? group_list_type=0, int? "
        "act_type=0, ScalarType? output_dtype=None) -> Tensor[]"
    ),
    "npu_grouped_matmul_swiglu_quant": (
        "(Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, Tensor x_scale, *, Tensor? bias=None, "
        "Tensor? offset=None) -> (Tensor, Tensor, Tensor)"
    ),
    "npu_grouped_matmul_swiglu_quant_v2": (
        "(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, Tensor group_list, *, Tensor? "
        "smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0, int? "
        "dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, int[]? tuning_config=None, "
        "int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, int? x_scale_dtype=None) -> "
        "(Tensor, Tensor)"
    ),
    "npu_fused_infer_attention_score": (
        "(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? "
        "actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None, Tensor? "
        "quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
        "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None, Tensor? "
        "key_antiquant_offset=None, Tensor? value_antiquant_scale=None, Tensor? value_antiquant_offset=None, "
        "Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? kv_padding_size=None, Tensor? "
        "key_shared_prefix=None, Tensor? value_shared_prefix=None, SymInt[]? actual_shared_prefix_len=None, "
        "Tensor? query_rope=None, Tensor? key_rope=None, Tensor? key_rope_antiquant_scale=None, int num_heads=1, "
        'float scale=1., int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH", int '
        "num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, int antiquant_mode=0, "
        "int key_antiquant_mode=0, int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
    ),
    "npu_scatter_pa_kv_cache": (
        "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, *, Tensor? "
        'compress_lens=None, Tensor? compress_seq_offsets=None, Tensor? seq_lens=None, str? cache_mode="PA_NZ") -> '
        "()"
    ),
}
