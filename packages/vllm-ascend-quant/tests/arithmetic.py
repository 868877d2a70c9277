"""What the survey compares: transformers computing a checkpoint's arithmetic, and vLLM's answers and layers."""

from dataclasses import dataclass
from typing import Any

import torch
from architectures import Tiny
from torch import Tensor, nn


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
    decisions = {id(model.get_submodule(path)): quant for path, quant in config.layers.items()}
    for path, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        method, decided = layer.quant_method, decisions.get(id(layer))
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


def expert_modules(llm: Any) -> list[str]:
    """The checkpoint modules that layers of experts hold quantised."""
    from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod

    model = llm.llm_engine.model_executor.driver_worker.get_model()
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    experts = [method.experts for method in methods if isinstance(method, AscendFusedMoEMethod)]
    return [name for halves in experts for rows in halves.values() for members in rows for name in members]


def layer_weights(llm: Any) -> dict[str, Tensor]:
    """What each linear layer of an engine's model multiplies by; see `weights_of`."""
    return weights_of(llm.llm_engine.model_executor.driver_worker.get_model())


@torch.no_grad()
def weights_of(model: nn.Module, *, with_bias: bool = False) -> dict[str, Tensor]:
    """What each linear layer multiplies by, [out, in], seen from outside: unit vectors quantise without error.

    `with_bias` adds the bias, which static types hold inside.
    """
    from vllm.model_executor.layers.linear import LinearBase

    weights = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase) and not (hasattr(layer, "weight") and layer.weight.dim() == 3):
            size = getattr(layer, "input_size_per_partition", layer.input_size)
            dtype = getattr(layer, "params_dtype", torch.float32)
            bias = getattr(layer, "bias", None) if with_bias else None
            weights[path] = layer.quant_method.apply(layer, torch.eye(size, dtype=dtype), bias).t().float()
    assert weights, "the model has no linear layer to look at"
    return weights


def wrong_weights(quantised: dict[str, Tensor], exact: dict[str, Tensor], largest: int = 127) -> list[str]:
    """Layers whose weights are not those of the float model, rounded to multiples of their maximum / `largest`."""
    wrong = []
    for path, weight in quantised.items():
        range_ = exact[path].amax(1, keepdim=True) - exact[path].amin(1, keepdim=True)  # without the bias
        if not ((weight - exact[path]).abs() <= 0.52 * range_ / largest + 0.01 * exact[path].abs()).all():
            wrong.append(path)
    return wrong
