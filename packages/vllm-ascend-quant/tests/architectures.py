"""Tiny models of many architectures, their ModelSlim checkpoints, and the same arithmetic computed by transformers.

Used by test_architectures.py (a dozen, with every run) and survey.py (all that we know how to make, by hand). Sizes
are small multiples of 32, weights are random but large enough that every layer moves the result.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Components of module names under which everything stays float, as quantisers leave it: towers, projectors, routers.
LEFT_FLOAT = {
    "vision_tower", "vision_model", "visual", "vision_embed_tokens", "vision_encoder", "vision", "vit_model", "vpm",
    "audio_tower", "audio_model", "audio", "audio_encoder", "embed_vision", "embed_audio", "multi_modal_projector",
    "mm_projector", "connector", "merger", "aligner", "patch_conv", "projector", "encoder_projector", "vqmodel",
    "lm_head", "embed_out", "experts", "gate", "router", "shared_expert_gate", "token2wav", "talker", "model_patch_embed",
}  # fmt: skip

#: Sizes for every config attribute that exists under one of these names.
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "ffn_hidden_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "sliding_window": 64, "depth": 2, "embed_dim": 128, "num_heads": 4, "out_hidden_size": 128, "image_size": 56,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "mamba_d_state": 16, "tie_word_embeddings": False, "max_window_layers": 2, "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How to make one tiny model.

    Attributes:
        model_type: transformers' name of the config class.
        model_class: the name of transformers' model class.
        config: what the config gets beside SIZES; dictionaries go to the sub-configs of these names.
        engine: arguments for the engine.
        rename: from the tensors that transformers saves to those of a twin that lays them out otherwise.
        published: what the twin's config.json says instead.
        float_layers: further components of names under which layers stay float.
    """

    model_type: str
    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    rename: Any = None
    published: dict[str, Any] = field(default_factory=dict)
    float_layers: frozenset[str] = frozenset()


def small_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """A config of this class with small sizes; sub-configs likewise."""
    default = config_class()
    values = {name: value for name, value in SIZES.items() if _settable(default, name, value)}
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        sub = overrides.get(name)
        if sub is False:
            continue
        actual = getattr(default, name, None)
        sub_class = type(actual) if hasattr(actual, "to_dict") else sub_class
        if not hasattr(sub_class, "sub_configs") or sub_class.__name__ == "AutoConfig":
            continue
        values[name] = small_config(sub_class, sub or {})
    for name, value in overrides.items():
        if not isinstance(values.get(name), config_class.__mro__[-2]) and not hasattr(values.get(name), "to_dict"):
            values[name] = value
    return config_class(**{name: value for name, value in values.items() if value is not False or name not in getattr(config_class, "sub_configs", {})})


def _settable(config: Any, name: str, value: Any) -> bool:
    try:
        had = hasattr(config, name)
        setattr(config, name, value)
    except Exception:  # properties, and attributes that differ by layer
        return False
    return had


def build(architecture: Architecture, seed: int = 0) -> nn.Module:
    """The float model in transformers."""
    import transformers
    from transformers import CONFIG_MAPPING

    torch.manual_seed(seed)
    config = small_config(CONFIG_MAPPING[architecture.model_type], architecture.config)
    config._attn_implementation = "eager"
    model_class = getattr(transformers, architecture.model_class)
    model = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that matter: rows of linear layers of norm near one, norms and biases off their defaults."""
    done = set()
    for name, module in model.named_modules():
        for kind, param in module.named_parameters(recurse=False):
            if id(param) in done:
                continue
            done.add(id(param))
            if isinstance(module, nn.Linear) and kind == "weight":
                scale = 3.0 if name.endswith("lm_head") else 1.0
                param.normal_(0, scale / param.shape[1] ** 0.5)
            elif isinstance(module, nn.Embedding):
                param.normal_(0, 0.5)
            elif kind == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
                param.normal_(0, 0.1)
            elif param.dim() == 1 and kind == "weight":
                param.add_(torch.randn_like(param) * 0.1)
            elif param.dim() == 3 and "experts" in name.split("."):
                param.normal_(0, 1 / param.shape[-1] ** 0.5)
            elif not torch.isfinite(param).all():
                param.zero_()


class Int8Linear(nn.Module):
    """W8A8_DYNAMIC as the scheme defines it, written down once more; sums stay exact in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().clamp(-128, 127))
        self.register_buffer("scale", scale.flatten())
        self.bias = linear.bias
        self.weight = linear.weight  # some models look at its dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Quantise per token, multiply, scale."""
        flat = x.reshape(-1, x.shape[-1]).float()
        x_scale = flat.abs().amax(1, keepdim=True) / 127
        codes = torch.where(x_scale > 0, flat / x_scale, 0.0).round().clamp(-128, 127)
        y = (codes @ self.codes.t()) * self.scale * x_scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)


@dataclass
class Tiny:
    """A tiny model on disk.

    Attributes:
        model: transformers' model; float until `quantise_reference`.
        tensors: what transformers saves.
        linears: disk module to the path in transformers' model, of layers to be quantised.
        expected: which of the checkpoint's modules are quantised, after renaming.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    linears: dict[str, str]
    expected: set[str] = field(default_factory=set)


def make(architecture: Architecture, folder: Path) -> Tiny:
    """Build a model and write its ModelSlim checkpoint to `folder / "quant"`, its float one to `folder / "float"`."""
    from quant_modelslim.writer import write_checkpoint
    from safetensors.torch import load_file, save_file

    model = build(architecture)
    model.save_pretrained(folder / "float")
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / "float").glob("*.safetensors")):
        tensors |= load_file(file)
    linears = text_linears(model, tensors, architecture.float_layers)
    quantised = {id(tensors[f"{module}.weight"]) for module in linears}
    if architecture.rename is not None:
        tensors, quantised = architecture.rename(tensors, quantised)
        for file in (folder / "float").glob("*.safetensors*"):
            file.unlink()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "float" / "model.safetensors", {"format": "pt"})
    if architecture.published:
        path = folder / "float" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **architecture.published}))
    chosen = {name.removesuffix(".weight") for name, tensor in tensors.items() if id(tensor) in quantised}
    write_checkpoint(
        folder / "quant",
        tensors,
        lambda module, _: "W8A8_DYNAMIC" if module in chosen else "FLOAT",
        files_from=folder / "float",
    )
    return Tiny(model, tensors, linears, chosen)


def text_linears(model: nn.Module, tensors: dict[str, Tensor], also_float: frozenset[str]) -> dict[str, str]:
    """Disk module to path of the language model's linear layers, found by their values: names may differ on disk."""
    by_value: dict[Any, str] = {}
    for path, module in model.named_modules():
        left = set(path.split(".")) & (LEFT_FLOAT | also_float)
        if isinstance(module, nn.Linear) and not left and module.out_features >= 32:
            by_value[_value(module.weight)] = path
    return {
        name.removesuffix(".weight"): by_value[_value(tensor)]
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and _value(tensor) in by_value
    }


def _value(tensor: Tensor) -> Any:
    return (*tensor.shape, *tensor.detach().flatten()[:6].tolist())


def quantise_reference(tiny: Tiny) -> None:
    """Let transformers compute what the checkpoint says."""
    for path in tiny.linears.values():
        parent, _, name = path.rpartition(".")
        setattr(tiny.model.get_submodule(parent), name, Int8Linear(tiny.model.get_submodule(path)))  # type: ignore[arg-type]


def prompts(vocabulary: int = 500, seed: int = 7) -> list[list[int]]:
    """Token ids away from the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, vocabulary, (length,), generator=generator).tolist() for length in (24, 9, 33)]


@torch.no_grad()
def reference_logprobs(model: nn.Module, prompts_: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of each prompt's tokens after the first."""
    answers = []
    for ids in prompts_:
        output = model(input_ids=torch.tensor([ids]), use_cache=False)
        logprobs = output.logits[0].float().log_softmax(-1)
        answers.append([logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)])
    return answers


def vllm_logprobs(llm: Any, prompts_: list[list[int]]) -> list[list[float]]:
    """The same from an engine."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts_], sampling, use_tqdm=False)
    return [
        [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        for ids, output in zip(prompts_, outputs, strict=True)
    ]


def differences(left: list[list[float]], right: list[list[float]]) -> tuple[float, float]:
    """Median and maximum of the absolute difference."""
    a, b = (torch.tensor([x for prompt in side for x in prompt]) for side in (left, right))
    gap = (a - b).abs()
    return gap.median().item(), gap.max().item()


@dataclass
class Layers:
    """What vLLM's model holds.

    Attributes:
        claimed: checkpoint modules behind quantised layers.
        quantised: paths of quantised layers.
        unquantised: paths of the others.
        wrong: complaints.
    """

    claimed: list[str]
    quantised: list[str]
    unquantised: list[str]
    wrong: list[str]


def inspect_layers(llm: Any) -> Layers:
    """Compare each linear layer's method with what was decided about it."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ascend_quant.methods.linear import AscendLinearMethod

    config = llm.llm_engine.vllm_config.quant_config
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    claimed, quantised, unquantised, wrong = [], [], [], []
    for path, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        method, decided = layer.quant_method, config.layers.get(path)
        if isinstance(method, AscendLinearMethod):
            quantised.append(path)
            claimed += method.quant.modules
            if decided is None or decided.modules != method.quant.modules:
                wrong.append(f"{path}: method {method.quant.modules}, decided {decided and decided.modules}")
        else:
            unquantised.append(path)
            if decided is not None and decided.quant_type is not None:
                wrong.append(f"{path}: {type(method).__name__}, decided {decided.quant_type}")
    return Layers(claimed, quantised, unquantised, wrong)


@torch.no_grad()
def layer_weights(llm: Any) -> dict[str, Tensor]:
    """What each linear layer multiplies by, [out, in], seen from outside: unit vectors quantise without error."""
    from vllm.model_executor.layers.linear import LinearBase

    model = llm.llm_engine.model_executor.driver_worker.get_model()
    weights = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase) and not (hasattr(layer, "weight") and layer.weight.dim() == 3):
            size = getattr(layer, "input_size_per_partition", layer.input_size)
            dtype = getattr(layer, "params_dtype", torch.float32)
            weights[path] = layer.quant_method.apply(layer, torch.eye(size, dtype=dtype)).t().float()
    return weights


def wrong_weights(quantised: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """Layers whose int8 weights are not those of the float model, rounded."""
    wrong = []
    for path, weight in quantised.items():
        step = exact[path].abs().amax(1, keepdim=True) / 127
        if not ((weight - exact[path]).abs() <= 0.51 * step + 0.01 * exact[path].abs()).all():
            wrong.append(path)
    return wrong
