"""Models as a worker of vllm-ascend builds and loads them, on a CPU.

Everything of vllm-ascend that is Python is real. Stand-ins take the place of what only an NPU has: its streams, and
operators that vllm-ascend compiles for it.
"""

import functools
import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

ROWS = 6


class StandInStream:
    """A stream of an NPU, on which nothing is ever late."""

    def record_event(self) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None


def _grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    group_list: Tensor,
    bias: Tensor | None,
    swiglu_limit: float,
) -> tuple[Tensor, Tensor, None]:
    """torch_npu's operator of the same meaning; `group_list` says where the rows of each expert end."""
    assert bias is None
    assert swiglu_limit == 0
    codes, scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [weight_scale], x_scale, group_list, group_list_type=0
    )
    return codes, scale, None


@functools.cache
def stand_in_for_npu() -> torch.library.Library:
    """What an NPU would have, and vllm-ascend asks for while it builds a model or calls one layer; once a process."""
    from vllm_ascend.ops import register_custom_ops
    from vllm_ascend.quantization.methods import w4a8, w8a8_dynamic

    torch.npu.current_device = lambda: torch.device("cpu")
    torch.npu.current_stream = StandInStream
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    compiled = torch.ops._C_ascend
    compiled.npu_moe_init_routing_custom = torch.ops.npu.npu_moe_init_routing_v2
    compiled.grouped_matmul_swiglu_quant_weight_nz = _grouped_matmul_swiglu_quant
    for peer in (w4a8, w8a8_dynamic):
        peer.get_mc2_group = SimpleNamespace  # it goes on without the name of an HCCL group
    kernel = torch.library.Library("vllm", "IMPL")
    kernel.impl("quantize", register_custom_ops._quantize_impl, "CPU")
    kernel.impl("unquantized_gemm", functional.linear, "CPU")
    return kernel


def front(folder: Path, **options: Any) -> Any:
    """vLLM's configuration by the front process, on vllm-ascend's platform."""
    settings = {"max_model_len": 256, "dtype": "bfloat16", "enforce_eager": True}
    return EngineArgs(model=str(folder), **{**settings, **options}).create_engine_config()


def on_cpu(config: Any) -> Any:
    """The same, for tensors on CPU."""
    config.device_config.device, config.device_config.device_type = torch.device("cpu"), "cpu"
    config.load_config.device = "cpu"
    return config


@contextmanager
def loaded(config: Any, rank: int = 0, ranks: int = 1, rendezvous: str = "") -> Iterator[nn.Module]:
    """The model, with vllm-ascend's layers, as a worker has it after loading."""
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader import get_model
    from vllm_ascend import ops
    from vllm_ascend.ascend_config import get_ascend_config, init_ascend_config
    from vllm_ascend.distributed import parallel_state
    from vllm_ascend.utils import adapt_patch, register_ascend_customop, set_weight_prefetch_method

    # As NPUWorker and its model runner do it.
    adapt_patch()
    ops.register_dummy_fusion_op()
    register_ascend_customop(config)
    init_ascend_config(config)
    stand_in_for_npu()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
        place = rendezvous or f"{folder}/group"
        try:
            init_distributed_environment(ranks, rank, f"file://{place}", rank, "gloo")
            ensure_model_parallel_initialized(ranks, 1)
            parallel_state.init_ascend_model_parallel(config.parallel_config)
            yield get_model(vllm_config=config)
        finally:
            parallel_state.destroy_ascend_model_parallel()
            destroy_model_parallel()
            destroy_distributed_environment()
            gc.collect()


def with_peers_config(config: Any, folder: Path) -> Any:
    """The same configuration with vllm-ascend's own quantisation in the place of ours."""
    from vllm_ascend.quantization.compressed_tensors_config import AscendCompressedTensorsConfig
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig

    section = getattr(config.model_config.hf_config, "quantization_config", None)
    if section is None:
        config.quant_config = AscendModelSlimConfig()
        config.quant_config.maybe_update_config(str(folder))
    else:
        config.quant_config = AscendCompressedTensorsConfig.from_config(section)
    return config


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of NPU operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        if name == "vllm.quantize":  # vllm-ascend's name for it, so that a compiler leaves it whole
            name = "npu.npu_quantize"
        if name.startswith("npu."):
            self.counts[name.removeprefix("npu.")] += 1
        return func(*args, **(kwargs or {}))


class Answer(SimpleNamespace):
    """What a layer gave out, by which scheme, and with how many calls of each operator."""

    output: Tensor
    scheme: str
    calls: Counter[str]


def answers(config: Any, model: nn.Module, rank: int = 0, ranks: int = 1) -> dict[str, Answer]:
    """What each linear layer, embedding and layer of experts gives out for inputs that depend on its name only."""
    found = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        generator = torch.Generator().manual_seed(len(name))
        with torch.inference_mode(), OperatorCalls() as counter:
            if isinstance(layer, VocabParallelEmbedding):
                if type(layer).__name__.endswith("LMHead"):
                    x = torch.randn(ROWS, layer.embedding_dim, generator=generator).bfloat16()
                    y = method.apply(layer, x)
                else:
                    y = method.embedding(layer, torch.arange(ROWS))
            elif isinstance(layer, LinearBase):
                x = torch.randn(ROWS, layer.input_size, generator=generator).bfloat16()
                row = isinstance(layer, RowParallelLinear)
                x = x.chunk(ranks, -1)[rank].contiguous() if row else x
                bias = None if row and rank > 0 else layer.bias
                y = method.apply(layer, x, None if layer.skip_bias_add else bias)
            elif "FusedMoE" in type(layer).__name__:
                y = experts(config, layer, *tokens(layer, name))
            else:
                continue
        scheme = getattr(method, "quant_method", method)
        found[name] = Answer(output=y, scheme=type(scheme).__name__, calls=counter.counts)
    return found


def tokens(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Tokens [ROWS, hidden] for a layer of experts, and the router's logits."""
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(ROWS, layer.hidden_size, generator=generator).bfloat16()
    return x, torch.randn(ROWS, layer.moe_config.num_experts, generator=generator)


def environment() -> dict[str, str]:
    """The variables of a process that is to find this module."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def experts(config: Any, layer: Any, x: Tensor, logits: Tensor) -> Tensor:
    """What the method of a layer of experts answers to the call that vllm-ascend's layer makes."""
    from vllm.forward_context import set_forward_context
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType
    from vllm_ascend.ops.fused_moe.moe_comm_method import get_moe_comm_method

    def routing(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        weights, ids = gating_output.softmax(-1).topk(topk)
        return weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)

    with set_forward_context(None, config):
        _EXTRA_CTX.moe_comm_type = MoECommType.ALLGATHER
        _EXTRA_CTX.moe_comm_method = get_moe_comm_method(MoECommType.ALLGATHER)
        result = layer.quant_method.apply(
            layer=layer,
            x=x.clone(),  # vllm-ascend frees it
            router_logits=logits,
            pertoken_scale=None,
            top_k=layer.top_k,
            renormalize=True,
            use_grouped_topk=False,
            num_experts=layer.moe_config.num_experts,
            expert_map=layer._expert_map,
            custom_routing_function=routing,
            scoring_func="softmax",
            routed_scaling_factor=1.0,
            activation=layer.activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            enable_force_load_balance=False,
            log2phy=None,
            global_redundant_expert_num=0,
            mc2_mask=None,
        )
    return result.routed_out
