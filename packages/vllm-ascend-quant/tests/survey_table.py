"""The architectures of survey.py."""

from dataclasses import replace
from typing import Any

from architectures import Architecture as A

ROPE_32 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
NO_AUDIO = {"limit_mm_per_prompt": {"audio": 0}}
#: The CPU's rotary operator is wrong for what MLA gives it (shared notes on vLLM, section 1).
NATIVE = {"compilation_config": {"custom_ops": ["none"]}}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
#: The decoder of the CPU's MLA is compiled for one size (same place).
MLA = {"num_key_value_heads": 4, "head_dim": 64}
#: vLLM's gated delta rule asserts it on CPU.
BFLOAT16 = {"dtype": "bfloat16"}
DEEPSEEK_V3 = {"hf_overrides": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, **NATIVE}


def vision_language(model_type: str, name: str, engine: dict[str, Any] | None = None, **config: Any) -> A:
    return A(model_type, f"{name}ForConditionalGeneration", config, {**NO_IMAGES, **(engine or {})})


def causal(model_type: str, name: str, engine: dict[str, Any] | None = None, **config: Any) -> A:
    return A(model_type, f"{name}ForCausalLM", config, engine or {})


def published(architecture: A, values: dict[str, Any]) -> A:
    """With what the published config.json has and transformers no longer writes."""
    return replace(architecture, published=values)


TABLE: dict[str, A] = {
    # dense
    "llama": causal("llama", "Llama"),
    "llama_tied": causal("llama", "Llama", tie_word_embeddings=True),
    "llama_bias": causal("llama", "Llama", attention_bias=True, mlp_bias=True),
    "qwen2": causal("qwen2", "Qwen2"),
    "qwen3": causal("qwen3", "Qwen3"),
    "mistral": causal("mistral", "Mistral"),
    "ministral3": causal("ministral3", "Ministral3"),
    "arcee": causal("arcee", "Arcee"),
    "apertus": causal("apertus", "Apertus"),
    "bloom": causal("bloom", "Bloom", n_layer=2, n_head=4, tie_word_embeddings=True),
    "cohere": causal("cohere", "Cohere", tie_word_embeddings=True),
    "cohere2": causal("cohere2", "Cohere2", tie_word_embeddings=True),
    "cwm": causal("cwm", "Cwm"),
    "ernie4_5": causal("ernie4_5", "Ernie4_5"),
    "exaone4": causal("exaone4", "Exaone4"),
    "falcon": causal("falcon", "Falcon", ffn_hidden_size=512),
    "falcon_new": causal("falcon", "Falcon", ffn_hidden_size=512, new_decoder_architecture=True, num_kv_heads=2),
    "gemma": causal("gemma", "Gemma", tie_word_embeddings=True),
    "gemma2": causal("gemma2", "Gemma2", tie_word_embeddings=True),
    "gemma3_text": causal("gemma3_text", "Gemma3", tie_word_embeddings=True),
    "gemma3n_text": causal(
        "gemma3n_text", "Gemma3n", tie_word_embeddings=True, intermediate_size=256, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": causal("gemma4_text", "Gemma4", tie_word_embeddings=True, enable_moe_block=False, layer_types=["sliding_attention", "full_attention"]),
    "gemma4_k_eq_v": causal("gemma4_text", "Gemma4", tie_word_embeddings=True, enable_moe_block=False, attention_k_eq_v=True, layer_types=["sliding_attention", "full_attention"]),
    "glm": causal("glm", "Glm"),
    "glm4": causal("glm4", "Glm4"),
    "gpt2": A("gpt2", "GPT2LMHeadModel", {"n_inner": 256, "tie_word_embeddings": True}),
    "gpt_bigcode": causal("gpt_bigcode", "GPTBigCode", n_inner=256, tie_word_embeddings=True),
    "gpt_neox": causal("gpt_neox", "GPTNeoX"),
    "gptj": causal("gptj", "GPTJ", rotary_dim=16, n_inner=256),
    "granite": causal("granite", "Granite"),
    "helium": causal("helium", "Helium"),
    "hunyuan_dense": causal("hunyuan_v1_dense", "HunYuanDenseV1"),
    "hyperclovax": causal("hyperclovax", "HyperCLOVAX"),
    "jais2": causal("jais2", "Jais2"),
    "minicpm3":
    A("minicpm3", "MiniCPM3ForCausalLM", {"num_key_value_heads": 4, "head_dim": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 64}, NATIVE),
    "nemotron": causal("nemotron", "Nemotron"),
    "olmo": causal("olmo", "Olmo"),
    "olmo2": causal("olmo2", "Olmo2"),
    "olmo3": causal("olmo3", "Olmo3", layer_types=["sliding_attention", "full_attention"]),
    "opt": causal("opt", "OPT", ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True),
    "opt_proj": causal("opt", "OPT", ffn_dim=256, word_embed_proj_dim=64, tie_word_embeddings=True),
    "persimmon": causal("persimmon", "Persimmon"),
    "phi": causal("phi", "Phi"),
    "phi3": causal("phi3", "Phi3"),
    "seed_oss": causal("seed_oss", "SeedOss"),
    "smollm3": causal("smollm3", "SmolLM3"),
    "stablelm": causal("stablelm", "StableLm"),
    "starcoder2": causal("starcoder2", "Starcoder2"),
    "vaultgemma": causal("vaultgemma", "VaultGemma"),
    "granite_swa": causal("granite_swa", "GraniteSWA"),
    # routed experts, float
    "qwen2_moe": causal("qwen2_moe", "Qwen2Moe", mlp_only_layers=[0]),
    "qwen3_moe": causal("qwen3_moe", "Qwen3Moe", mlp_only_layers=[0]),
    "mixtral": causal("mixtral", "Mixtral"),
    "olmoe": causal("olmoe", "Olmoe"),
    "flex_olmo": causal("flex_olmo", "FlexOlmo"),
    "dbrx": A("dbrx", "DbrxForCausalLM", {"ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}}),
    "deepseek_v2": causal("deepseek_v2", "DeepseekV2", NATIVE, **MLA),
    "deepseek_v2_lite": causal("deepseek_v2", "DeepseekV2", NATIVE, q_lora_rank=None, **MLA),
    "deepseek_v3": causal("deepseek_v3", "DeepseekV3", DEEPSEEK_V3, **MLA, first_k_dense_replace=1),
    "dots1": causal("dots1", "Dots1", first_k_dense_replace=1),
    "ernie4_5_moe": causal("ernie4_5_moe", "Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "exaone_moe": causal("exaone_moe", "ExaoneMoe"),
    "afmoe": published(causal("afmoe", "Afmoe", num_dense_layers=1, num_shared_experts=1), {'score_func': 'sigmoid'}),
    "glm4_moe": published(causal("glm4_moe", "Glm4Moe", first_k_dense_replace=1), {'head_dim': 32}),
    "glm4_moe_lite": causal("glm4_moe_lite", "Glm4MoeLite", DEEPSEEK_V3, **MLA, first_k_dense_replace=1),
    "gpt_oss": causal("gpt_oss", "GptOss"),
    "granitemoe": causal("granitemoe", "GraniteMoe"),
    "granitemoeshared": causal("granitemoeshared", "GraniteMoeShared", shared_intermediate_size=128),
    "hunyuan_moe": causal("hunyuan_v1_moe", "HunYuanMoEV1"),
    "llama4_text": causal("llama4_text", "Llama4", intermediate_size_mlp=256, num_experts_per_tok=1),
    "longcat_flash": published(causal("longcat_flash", "LongcatFlash", DEEPSEEK_V3, **MLA, num_layers=2, ffn_hidden_size=256, expert_ffn_hidden_size=64, zero_expert_num=2, moe_topk=2), {'mla_scale_q_lora': True, 'mla_scale_kv_lora': True, 'zero_expert_type': 'identity'}),
    "mellum": causal("mellum", "Mellum"),
    "minimax_m2": published(causal("minimax_m2", "MiniMaxM2"), {'rotary_dim': 32, 'scoring_func': 'sigmoid'}),
    "axk1": causal("axk1", "AXK1", DEEPSEEK_V3, **MLA),
    "phimoe": causal("phimoe", "Phimoe"),
    "laguna": causal("laguna", "Laguna"),
    "cohere2_moe": causal("cohere2_moe", "Cohere2Moe", tie_word_embeddings=True),
    "hy_v3": published(causal("hy_v3", "HYV3"), {'first_k_dense_replace': 1}),
    "mimo_v2_flash": published(causal("mimo_v2_flash", "MiMoV2Flash"), {'hybrid_layer_pattern': [0, 1], 'moe_layer_freq': [0, 1], 'layernorm_epsilon': 1e-05}),
    # state spaces and linear attention
    "mamba": causal("mamba", "Mamba", state_size=16, time_step_rank=32, intermediate_size=256),
    "mamba2": causal("mamba2", "Mamba2", num_heads=8, head_dim=32, state_size=16, n_groups=1),
    "falcon_mamba": causal("falcon_mamba", "FalconMamba", state_size=16, time_step_rank=32, intermediate_size=256),
    "falcon_h1": causal("falcon_h1", "FalconH1", mamba_d_ssm=256, mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=1),
    "granitemoehybrid": causal("granitemoehybrid", "GraniteMoeHybrid", layer_types=["mamba", "attention"], shared_intermediate_size=128, mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=1),
    "jamba": causal("jamba", "Jamba", attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, mamba_dt_rank=32),
    "zamba2": causal("zamba2", "Zamba2", layers_block_type=["mamba", "hybrid"], num_hidden_layers=2, mamba_headdim=32, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1, num_key_value_heads=4, attention_head_dim=64),
    "nemotron_h": causal("nemotron_h", "NemotronH", layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=8, mamba_head_dim=32, n_groups=1, ssm_state_size=16),
    "lfm2": published(causal("lfm2", "Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False), {'conv_dim': 128}),
    "lfm2_moe": causal("lfm2_moe", "Lfm2Moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    "qwen3_next": causal("qwen3_next", "Qwen3Next", BFLOAT16, **HYBRID),
    "qwen3_5_text": causal("qwen3_5_text", "Qwen3_5", BFLOAT16, **HYBRID),
    "olmo_hybrid": causal("olmo_hybrid", "OlmoHybrid", BFLOAT16, **HYBRID),
    "kimi_linear": causal("kimi_linear", "KimiLinear", NATIVE, **MLA, **HYBRID),
    # several modalities, text only asked
    "aria": vision_language("aria", "Aria", text_config={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "aya_vision": vision_language("aya_vision", "AyaVision"),
    "blip2": vision_language("blip-2", "Blip2", text_config={"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "chameleon": vision_language("chameleon", "Chameleon", vocabulary_map={"<image>": 3, "A": 4, "B": 5}),
    "cohere2_vision": vision_language("cohere2_vision", "Cohere2Vision"),
    "emu3": vision_language("emu3", "Emu3", vocabulary_map={"<image>": 3, "A": 4, "B": 5}),
    "fuyu": causal("fuyu", "Fuyu", NO_IMAGES),
    "gemma3": vision_language("gemma3", "Gemma3"),
    "gemma3n": vision_language("gemma3n", "Gemma3n", {"limit_mm_per_prompt": {"image": 0, "audio": 0}}),
    "glm4v": vision_language("glm4v", "Glm4v", text_config={"rope_parameters": {**ROPE_32, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}),
    "glm4v_moe": vision_language("glm4v_moe", "Glm4vMoe", text_config={"first_k_dense_replace": 1, "rope_parameters": {**ROPE_32, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}),
    "glm_ocr": vision_language("glm_ocr", "GlmOcr"),
    "idefics3": vision_language("idefics3", "Idefics3"),
    "smolvlm": vision_language("smolvlm", "SmolVLM"),
    "internvl": vision_language("internvl", "InternVL"),
    "lfm2_vl": vision_language("lfm2_vl", "Lfm2Vl", text_config={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "llama4": vision_language("llama4", "Llama4", text_config={"intermediate_size_mlp": 256}),
    "llava": vision_language("llava", "Llava"),
    "llava_next": vision_language("llava_next", "LlavaNext"),
    "llava_next_video": vision_language("llava_next_video", "LlavaNextVideo"),
    "llava_onevision": vision_language("llava_onevision", "LlavaOnevision"),
    "mistral3": vision_language("mistral3", "Mistral3"),
    "paligemma": vision_language("paligemma", "PaliGemma"),
    "paddleocr_vl": vision_language("paddleocr_vl", "PaddleOCRVL"),
    "qwen2_vl": vision_language("qwen2_vl", "Qwen2VL", text_config={"rope_parameters": ROPE_32}),
    "qwen2_5_vl": vision_language("qwen2_5_vl", "Qwen2_5_VL", text_config={"rope_parameters": ROPE_32}, vision_config={"fullatt_block_indexes": [1]}),
    "qwen3_vl": vision_language("qwen3_vl", "Qwen3VL", text_config={"rope_parameters": ROPE_32}, vision_config={"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": vision_language("qwen3_vl_moe", "Qwen3VLMoe", text_config={"rope_parameters": ROPE_32}, vision_config={"deepstack_visual_indexes": [0]}),
    "qwen3_5": vision_language("qwen3_5", "Qwen3_5", BFLOAT16, text_config=HYBRID),
    "qwen3_5_moe": vision_language("qwen3_5_moe", "Qwen3_5Moe", BFLOAT16, text_config=HYBRID),
    "hunyuan_vl": vision_language("hunyuan_vl", "HunYuanVL"),
    "exaone4_5": vision_language("exaone4_5", "Exaone4_5_"),
    "mllama": vision_language("mllama", "Mllama"),
    "qwen2_audio": vision_language("qwen2_audio", "Qwen2Audio", NO_AUDIO),
    "voxtral": vision_language("voxtral", "Voxtral", NO_AUDIO),
    "granite_speech": vision_language("granite_speech", "GraniteSpeech", NO_AUDIO),
    # the transformers backend
    "tf_llama": causal("llama", "Llama", {"model_impl": "transformers"}),
    "tf_qwen3": causal("qwen3", "Qwen3", {"model_impl": "transformers"}),
    "tf_phi3": causal("phi3", "Phi3", {"model_impl": "transformers"}),
    "tf_qwen3_moe": causal("qwen3_moe", "Qwen3Moe", {"model_impl": "transformers"}, mlp_only_layers=[0]),
    "tf_qwen2_5_vl": vision_language("qwen2_5_vl", "Qwen2_5_VL", {"model_impl": "transformers"}, text_config={"rope_parameters": ROPE_32}, vision_config={"fullatt_block_indexes": [1]}),
    "tf_gemma2": causal("gemma2", "Gemma2", {"model_impl": "transformers"}, tie_word_embeddings=True),
    "tf_helium": causal("helium", "Helium"),
    "tf_nanochat": A("nanochat", "NanoChatForCausalLM"),
    "tf_bitnet": A("bitnet", "BitNetForCausalLM"),
    "tf_doge": A("doge", "DogeForCausalLM"),
}
