"""The architectures of survey.py."""

from architectures import Architecture
from survey_experts import EXPERTS
from survey_kinds import (
    BFLOAT16,
    CLIP,
    HYBRID,
    NATIVE,
    NO_AUDIO,
    NO_IMAGES,
    ROPE_32,
    causal,
    internlm2,
    published,
    vision_language,
)

DENSE: dict[str, Architecture] = {
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
        "gemma3n_text",
        "Gemma3n",
        tie_word_embeddings=True,
        intermediate_size=256,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": causal(
        "gemma4_text",
        "Gemma4",
        tie_word_embeddings=True,
        num_experts=None,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma4_k_eq_v": causal(
        "gemma4_text",
        "Gemma4",
        tie_word_embeddings=True,
        num_experts=None,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm": causal("glm", "Glm"),
    "glm4": causal("glm4", "Glm4"),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", {"n_inner": 256, "tie_word_embeddings": True}),
    "gpt_bigcode": causal("gpt_bigcode", "GPTBigCode", n_inner=256, tie_word_embeddings=True),
    "gpt_neox": causal("gpt_neox", "GPTNeoX"),
    "gptj": causal("gptj", "GPTJ", rotary_dim=16, n_inner=256),
    "granite": causal("granite", "Granite"),
    "helium": causal("helium", "Helium"),
    "hunyuan_dense": causal("hunyuan_v1_dense", "HunYuanDenseV1"),
    "hyperclovax": causal("hyperclovax", "HyperCLOVAX"),
    "jais2": causal("jais2", "Jais2"),
    "minicpm3": Architecture(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "head_dim": 32,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "kv_lora_rank": 64,
        },
        NATIVE,
    ),
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
    "internlm2": Architecture(
        "llama",
        "LlamaForCausalLM",
        rename=internlm2,
        published={"architectures": ["InternLM2ForCausalLM"], "bias": False},
    ),
}

MULTIMODAL: dict[str, Architecture] = {
    # several modalities, text only asked
    "aria": vision_language(
        "aria", "Aria", text_config={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    ),
    "aya_vision": vision_language(
        "aya_vision", "AyaVision", tie_word_embeddings=True, text_config={"tie_word_embeddings": True}
    ),
    "chameleon": vision_language("chameleon", "Chameleon", vocabulary_map={"<image>": 3, "A": 4, "B": 5}),
    "cohere2_vision": vision_language(
        "cohere2_vision", "Cohere2Vision", tie_word_embeddings=True, text_config={"tie_word_embeddings": True}
    ),
    "emu3": vision_language("emu3", "Emu3", vocabulary_map={"<image>": 3, "A": 4, "B": 5}),
    "fuyu": causal("fuyu", "Fuyu", NO_IMAGES),
    "gemma3": vision_language("gemma3", "Gemma3"),
    "glm4v": published(
        vision_language(
            "glm4v",
            "Glm4v",
            text_config={"rope_parameters": {**ROPE_32, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}},
        ),
        {"text_config": {"attention_bias": True}},
    ),
    "glm4v_moe": published(
        vision_language(
            "glm4v_moe",
            "Glm4vMoe",
            text_config={
                "first_k_dense_replace": 1,
                "rope_parameters": {**ROPE_32, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
            },
        ),
        {"text_config": {"attention_bias": True, "head_dim": 32}},
    ),
    "glm_ocr": vision_language(
        "glm_ocr",
        "GlmOcr",
        text_config={"rope_parameters": {**ROPE_32, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}},
    ),
    "idefics3": vision_language("idefics3", "Idefics3"),
    "smolvlm": vision_language("smolvlm", "SmolVLM"),
    "internvl": vision_language("internvl", "InternVL"),
    "lfm2_vl": published(
        vision_language(
            "lfm2_vl",
            "Lfm2Vl",
            text_config={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ),
        {
            "text_config": {
                "conv_dim": 128,
                "block_dim": 128,
                "block_ff_dim": 256,
                "block_multiple_of": 32,
                "block_ffn_dim_multiplier": 1.0,
                "conv_bias": False,
            }
        },
    ),
    "llama4": vision_language("llama4", "Llama4", text_config={"intermediate_size_mlp": 256, "num_experts_per_tok": 1}),
    "llava": vision_language("llava", "Llava", vision_config=CLIP),
    "llava_next": vision_language("llava_next", "LlavaNext", vision_config=CLIP),
    "llava_next_video": vision_language("llava_next_video", "LlavaNextVideo", vision_config=CLIP),
    "llava_onevision": vision_language("llava_onevision", "LlavaOnevision"),
    "mistral3": vision_language("mistral3", "Mistral3"),
    "paligemma": vision_language("paligemma", "PaliGemma"),
    "paddleocr_vl": vision_language("paddleocr_vl", "PaddleOCRVL", text_config={"rope_parameters": ROPE_32}),
    "qwen2_vl": vision_language("qwen2_vl", "Qwen2VL", text_config={"rope_parameters": ROPE_32}),
    "qwen2_5_vl": vision_language(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        text_config={"rope_parameters": ROPE_32},
        vision_config={"fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": vision_language(
        "qwen3_vl", "Qwen3VL", text_config={"rope_parameters": ROPE_32}, vision_config={"deepstack_visual_indexes": [0]}
    ),
    "qwen3_vl_moe": published(
        vision_language(
            "qwen3_vl_moe",
            "Qwen3VLMoe",
            text_config={"rope_parameters": ROPE_32},
            vision_config={"deepstack_visual_indexes": [0]},
        ),
        {"text_config": {"norm_topk_prob": True}},
    ),
    "qwen3_5": vision_language("qwen3_5", "Qwen3_5", BFLOAT16, text_config=HYBRID),
    "qwen3_5_moe": vision_language("qwen3_5_moe", "Qwen3_5Moe", BFLOAT16, text_config=HYBRID),
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
    "tf_gemma2": causal("gemma2", "Gemma2", {"model_impl": "transformers"}, tie_word_embeddings=True),
    "tf_helium": causal("helium", "Helium"),
    "tf_nanochat": Architecture("nanochat", "NanoChatForCausalLM"),
    "tf_bitnet": Architecture("bitnet", "BitNetForCausalLM"),
    "tf_doge": Architecture("doge", "DogeForCausalLM"),
}

TABLE = {**DENSE, **EXPERTS, **MULTIMODAL}
