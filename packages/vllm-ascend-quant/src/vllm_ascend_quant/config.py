"""vLLM's QuantizationConfig over any QuantFormat.

It holds what was read and what vLLM handed over, and no decision: vLLM pickles it, copies it, and gives a draft its
target's. What was decided about a built model belongs to its `ServedModel`.

Every process that runs vLLM imports this module, so what only our models need is imported where they need it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from quant_core import (
    CheckpointFolder,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LoadError,
    QuantFormat,
    list_formats,
    require_scheme_class,
)
from quant_core.names import ModuleNames
from vllm_ascend_quant import ascend_platform
from vllm_ascend_quant.ascend_platform.runtime import AscendRuntimeView
from vllm_ascend_quant.compat import check_complete, map_name
from vllm_ascend_quant.placement.paths import without_prefix
from vllm_ascend_quant.versions import check_same, packages


class AscendQuantizationConfig(AscendRuntimeView, QuantizationConfig):
    """The adapter: asks the format about each of vLLM's layers and answers with a method that holds the scheme.

    Attributes:
        format_name: the QuantFormat's name.
        format: the checkpoint, once `maybe_update_config` has read it.
        open_folder: gets the model's folder, downloading it if it must; set before `maybe_update_config`, which uses
            it up.
        values_are_read: whether the weights of this folder are loaded; set likewise.

    """

    format_name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.format: QuantFormat | None = None
        self.open_folder: Callable[[], CheckpointFolder] | None = None
        self.values_are_read = True
        self._mappers: list[Any] = []
        self._names: ModuleNames | None = None
        self._numbered: Any = None  # see placement/experts.py

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a third party's format is made at run time, so it is found by the format's name.
        return _new_config, (self.format_name, packages(self.format_name)), self.__dict__

    @classmethod
    def format_class(cls) -> type[QuantFormat]:
        """The installed format."""
        return list_formats()[cls.format_name]

    @property
    def layers(self) -> Mapping[str, LayerQuant]:
        """What was decided about each layer of the model that this process built with this config, by module path."""
        from vllm_ascend_quant.served_model import layers_served_from

        return layers_served_from(self.format)

    def get_name(self) -> str:  # type: ignore[override]
        """The name under which vLLM knows the method."""
        return self.format_class().vllm_name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the operators take; float32 on CPU, where the numbers are compared."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Asked on GPUs only."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the folder is read in `maybe_update_config`, which gives a better error when something is wrong."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AscendQuantizationConfig":
        """What config.json says is not needed; see `maybe_update_config`."""
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claim a checkpoint that was recognised, and whose config.json has a section that names no method."""
        method = cls.format_class().vllm_name
        return method if user_quant == method and hf_quant_cfg.get("quant_method") in (None, "", method) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read and check the files; vLLM calls this in the front process, where a user sees the error.

        Raises:
            QuantError: everything that can be said without the model.

        """
        check_complete()
        open_folder, self.open_folder = self.open_folder, None  # workers get what was read, not how
        folder = open_folder() if open_folder else CheckpointFolder.locate(model_name, revision=revision)
        if folder is None:
            raise LoadError(
                f"{model_name} is neither a folder nor in this machine's Hugging Face cache",
                todo="download the model first (`hf download`), or give its folder",
            )
        self.format = self.format_class().load(folder)
        if self.values_are_read:
            from vllm_ascend_quant.loading.contents import check_tails

            check_tails(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Remember how a model renames a checkpoint's modules. Called once per model class that has a mapper."""
        if hf_to_vllm_mapper not in self._mappers:
            self._mappers.append(hf_to_vllm_mapper)
            self._names = self._numbered = None

    def get_quant_method(self, layer: nn.Module, prefix: str, **options: Any) -> QuantizeMethodBase | None:
        """The method for a layer under the name that vLLM gives it while the model is being built.

        The name is a hint: it may be empty or differ from the module's path. So what cannot be resolved is taken as
        float here, and every layer is decided again by its path once the model is built (placement/deciding.py).

        Args:
            layer: any.
            prefix: its name.
            **options: what vllm-ascend gives for experts besides: `tid2eid`.

        Raises:
            QuantError: if the layer is resolved, but cannot be served.

        """
        check_complete()
        from vllm_ascend_quant.choice import QUANTISABLE, method_for
        from vllm_ascend_quant.methods.linear import layer_class
        from vllm_ascend_quant.placement.experts import is_expert_layer

        build = _build.get()
        config = self if build is None else build.config
        name = prefix if build is None else without_prefix(prefix, build.prefix)
        made_up = build is not None and build.made_up
        if is_expert_layer(layer):
            method = None if config is None else config._expert_method(layer, name, made_up)
            found: QuantizeMethodBase | None = ascend_platform.for_experts(method, layer, **options)
            return found
        if not isinstance(layer, QUANTISABLE):
            return None
        if config is None or config.format is None:
            return method_for(layer, prefix, None, None, False)
        return method_for(layer, name, config.format, config.guess(name, layer_class(layer)), made_up)

    def guess(self, name: str, kind: str = "Linear") -> LayerQuant | None:
        """What the format says of a layer by vLLM's name for it; None if that names nothing in the checkpoint."""
        assert self.format is not None, "vLLM calls maybe_update_config first"
        try:
            return self.format.layer_quant(LayerQuery(name, modules=self.find(name), layer_class=kind))
        except LayerResolutionError:
            return None

    def _expert_method(self, layer: nn.Module, name: str, made_up: bool) -> QuantizeMethodBase | None:
        """The method of quantised experts under the name that vLLM gives them; None for float ones."""
        from vllm_ascend_quant.placement.experts import expert_modules, numbered_children

        if self.format is None:
            return None
        if self._numbered is None:
            self._numbered = numbered_children(self._renamed().stored_at)
        experts = expert_modules(layer, name, self._numbered, self.format)
        if experts is None:
            return None
        quant = self.format.experts_quant(LayerQuery(name, "moe", experts=experts))
        if quant.quant_type is None:
            return None
        method_class = ascend_platform.expert_method_class()
        return method_class(layer, self.format, name, experts, quant, made_up)

    def find(self, name: str) -> tuple[str, ...]:
        """The checkpoint modules behind a name, by the mappers and packed modules that vLLM handed over.

        Raises:
            LayerResolutionError: if the checkpoint has only some members of a fused layer.

        """
        return self._renamed().find(name, self.packed_modules_mapping)

    def _renamed(self) -> ModuleNames:
        """The checkpoint's modules by vLLM's names."""
        if self._names is None:
            assert self.format is not None
            self._names = ModuleNames.renamed(self.format.modules, self._rename)
        return self._names

    def _rename(self, module: str) -> str | None:
        """A checkpoint's module name as vLLM's."""
        name: str = f"{module}.weight"
        for mapper in self._mappers:
            mapped = map_name(mapper, name)
            if mapped is None:
                return None
            name = mapped[0]
        return name.removesuffix(".weight")


class AscendModelSlimConfig(AscendQuantizationConfig):
    """`--quantization ascend`: a folder that msModelSlim wrote."""

    format_name: ClassVar[str] = "modelslim"

    @property
    def quant_description(self) -> Mapping[str, Any]:
        """Tensor name to type, as the description file has it."""
        description = getattr(self.format, "description", None)
        return {} if description is None else description.types


class AscendCompressedTensorsConfig(AscendQuantizationConfig):
    """`--quantization compressed-tensors`: a folder that llm-compressor wrote."""

    format_name: ClassVar[str] = "compressed-tensors"

    @property
    def target_scheme_map(self) -> Mapping[str, Mapping[str, Any]]:
        """Target to `weights`, `input_activations` and `format`, under vLLM's names for them."""
        section = getattr(self.format, "section", None)
        return {} if section is None else section.target_scheme_map

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """None: the section always names the method, and vLLM lets no built-in name claim another's checkpoint."""
        return

    def _get_scheme_from_parts(self, weights: Any, input_activations: Any, format: str | None = None) -> Any:
        """The scheme class of linear layers for the library's arguments; raises as `combinations.quant_type`."""
        from quant_compressed_tensors.combinations import quant_type

        return require_scheme_class(quant_type(weights, input_activations), "linear")


_NAMED: dict[str, type[AscendQuantizationConfig]] = {
    named.format_name: named for named in (AscendModelSlimConfig, AscendCompressedTensorsConfig)
}


@functools.cache
def config_class(format_name: str) -> type[AscendQuantizationConfig]:
    """The config class of a format: a named one where we have it, else one made from the generic adapter."""
    if format_name in _NAMED:
        return _NAMED[format_name]
    title = "".join(part.capitalize() for part in format_name.replace("-", "_").split("_"))
    return type(f"Ascend{title}Config", (AscendQuantizationConfig,), {"format_name": format_name})


def _new_config(format_name: str, made_with: Mapping[str, str]) -> AscendQuantizationConfig:
    """A config as it is unpickled, before what it holds is; raises as `check_same`."""
    check_same(format_name, made_with)
    return config_class(format_name)()


@dataclass(frozen=True)
class _Build:
    """The model that is being built.

    Attributes:
        config: its own; None if it is not one of ours.
        prefix: of the names that vLLM gives.
        made_up: whether its first weights are made up.

    """

    config: AscendQuantizationConfig | None
    prefix: str
    made_up: bool


_build: ContextVar[_Build | None] = ContextVar("_build", default=None)


@contextmanager
def while_building(config: AscendQuantizationConfig | None, prefix: str = "", made_up: bool = False) -> Iterator[None]:
    """While it lasts, a model is being built, and its own config answers for its layers, whichever is asked.

    vLLM builds a draft with its target's config, and some drafts read a config of their own; a draft in float, whose
    config is None, gets methods of vLLM's own.
    """
    token = _build.set(_Build(config, prefix, made_up))
    try:
        yield
    finally:
        _build.reset(token)
