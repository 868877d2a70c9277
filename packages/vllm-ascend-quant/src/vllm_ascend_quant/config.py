"""vLLM's QuantizationConfig over any QuantFormat."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from quant_core import (
    CheckpointFolder,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LoadError,
    QuantFormat,
    UnknownLayerError,
    list_formats,
    require_scheme_class,
)
from quant_core.names import ModuleNames
from vllm_ascend_quant.compat import map_name
from vllm_ascend_quant.methods.embedding import AscendEmbeddingMethod
from vllm_ascend_quant.methods.linear import AscendLinearMethod

logger = init_logger("vllm.ascend_quant")


class AscendQuantizationConfig(QuantizationConfig):
    """The adapter: asks the format about each of vLLM's layers and answers with a method that holds the scheme.

    Attributes:
        format_name: the QuantFormat's name.
        format: the checkpoint, once `maybe_update_config` has read it.
        layers: what was decided about each layer of the built model, by module path.
        source: gets the model's folder, downloading it if it must; hooks.py sets it, `maybe_update_config` uses it.
        dummy: whether weights are made up (`load_format="dummy"`), so that their values mean nothing.

    """

    format_name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.format: QuantFormat | None = None
        self.layers: dict[str, LayerQuant] = {}
        self.source: Callable[[], CheckpointFolder] | None = None
        self.dummy = False
        self._mappers: list[Any] = []
        self._names: ModuleNames | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a third party's format is made at run time, so it is found by the format's name.
        return _new_config, (self.format_name,), self.__dict__

    @classmethod
    def format_class(cls) -> type[QuantFormat]:
        """The installed format."""
        return list_formats()[cls.format_name]

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
        source, self.source = self.source, None  # workers get what was read, not how
        folder = source() if source else CheckpointFolder.locate(model_name, revision=revision)
        if folder is None:
            raise LoadError(
                f"{model_name} is neither a folder nor in this machine's Hugging Face cache",
                todo="download the model first (`hf download`), or give its folder",
            )
        self.format = self.format_class().load(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Remember how a model renames a checkpoint's modules. Called once per model class that has a mapper."""
        if hf_to_vllm_mapper not in self._mappers:
            self._mappers.append(hf_to_vllm_mapper)
            self._names = None

    def get_quant_method(self, layer: nn.Module, prefix: str, **_: Any) -> QuantizeMethodBase | None:
        """The method for a layer under the name that vLLM gives it while the model is being built.

        The name is a hint: it may be empty or differ from the module's path. So what cannot be resolved is taken as
        float here, and every layer is decided again by its path once the model is built (settling.py).

        Raises:
            QuantError: if the layer is resolved, but cannot be served.

        """
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        try:
            quant = self.resolve(prefix, self.find(prefix, self.packed_modules_mapping))
        except LayerResolutionError:
            return self.method(layer, prefix, None)
        return self.method(layer, prefix, quant)

    def method(self, layer: nn.Module, name: str, quant: LayerQuant | None) -> QuantizeMethodBase:
        """The method for an answer of the format about a linear or vocabulary layer."""
        vocabulary = isinstance(layer, VocabParallelEmbedding)
        if quant is None or quant.quant_type is None:
            return UnquantizedEmbeddingMethod() if vocabulary else UnquantizedLinearMethod()
        return (AscendEmbeddingMethod if vocabulary else AscendLinearMethod)(self, name, quant)

    def resolve(self, name: str, modules: tuple[str, ...]) -> LayerQuant:
        """The format's answer about checkpoint modules; raises as QuantFormat.layer_quant."""
        assert self.format is not None, "vLLM calls maybe_update_config first"
        return self.format.layer_quant(LayerQuery(name, modules=modules))

    def find(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The checkpoint modules behind a name, by the mappers and packed modules that vLLM handed over."""
        if self._names is None:
            assert self.format is not None
            self._names = ModuleNames(self.format.folder.modules, self._rename)
        return self._names.find(name, packed_modules)

    def refuse_quantised(self, name: str, layer_type: str, modules: Iterable[str]) -> None:
        """Refuse layers of a kind that no scheme serves yet, if the checkpoint quantises them.

        Raises:
            UnsupportedSchemeError: names type and layer.

        """
        for module in modules:
            try:
                quant = self.resolve(module, (module,))
            except UnknownLayerError:
                continue  # tensors that are no module's weight, and that the description leaves out
            if quant.quant_type is not None:
                require_scheme_class(quant.quant_type, layer_type, where=f"{name} ({quant.evidence[0]})")

    def log_report(self) -> None:
        """One line per kind of layer."""
        kinds = Counter(quant.quant_type or "FLOAT" for quant in self.layers.values())
        for quant_type, count in sorted(kinds.items()):
            logger.info("%s: %d layers %s", self.get_name(), count, quant_type)

    def _rename(self, module: str) -> str | None:
        """A checkpoint's module name as vLLM's."""
        name: str = f"{module}.weight"
        for mapper in self._mappers:
            mapped = map_name(mapper, name)
            if mapped is None:
                return None
            name = mapped[0]
        return name.removesuffix(".weight")


@functools.cache
def config_class(format_name: str) -> type[AscendQuantizationConfig]:
    """The config class of a format: a named one where we have it, else one made from the generic adapter."""
    from vllm_ascend_quant.modelslim import AscendModelSlimConfig  # derives from this module

    named = {AscendModelSlimConfig.format_name: AscendModelSlimConfig}
    if format_name in named:
        return named[format_name]
    title = "".join(part.capitalize() for part in format_name.replace("-", "_").split("_"))
    return type(f"Ascend{title}Config", (AscendQuantizationConfig,), {"format_name": format_name})


def _new_config(format_name: str) -> AscendQuantizationConfig:
    return config_class(format_name)()
