"""One model that vLLM built from a checkpoint of ours, and everything that is known about it.

vLLM copies, pickles and shares a `QuantizationConfig`: a speculative draft is built with its target's, and a reload
needs what was decided long before. So decisions belong to the built model. They live as long as it does.
"""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from vllm.logger import init_logger

from quant_core import LayerQuant, LayerQuery, QuantFormat, StoredForm
from vllm_ascend_quant import compat
from vllm_ascend_quant.placement.guessing import guessed_modules
from vllm_ascend_quant.placement.paths import ModelPaths

logger = init_logger("vllm.ascend_quant")


#: What writers call the layers for multi-token prediction that they add to a model.
_MTP = "mtp"


@dataclass
class Loading:
    """How the loading of one model stands.

    Attributes:
        held: what vLLM's `ModelConfig.model` was when weights were last loaded without an error.
        called: whether the model's `load_weights` was called since the last check; it is not for made-up weights.
        reported: the parameters that it reported; None where a model does not report.
        came: the tensors that it was given, by their names in the checkpoint.
        expected: the parameters that every load must fill, each by all its names.
        processed: whether the layers are in their run-time form, which nothing can be loaded into.

    """

    held: str
    called: bool = False
    reported: set[str] | None = None
    came: set[str] = field(default_factory=set)
    expected: frozenset[frozenset[str]] = frozenset()
    processed: bool = False

    def take(self) -> tuple[bool, set[str] | None, set[str]]:
        """Whether there was a load since the last time, what it reported and was given; the next one starts anew."""
        taken = self.called, self.reported, self.came
        self.called, self.reported, self.came = False, None, set()
        return taken


@dataclass
class ServedModel:
    """The owner of all that is decided and known about one built model. It does not hold the model itself.

    Attributes:
        format: the checkpoint that the model is served from.
        model_config: vLLM's config of this model, whose `model` is the folder that weights are loaded from. A draft
            has one of its own.
        made_up: whether the first weights are made up (`load_format="dummy"`), so that their values mean nothing.
        paths: where the loader puts each checkpoint module.
        layers: what was decided about each layer, by module path.
        absent_members: the members of fused float layers of which the files have no weight, by module path.
        loading: how the loading stands.
        caches: the quantised caches, by the path of their attention layer.
        cache_tensors: the parameters that tensors of quantised caches go to, by the checkpoint's names of these.
        drafts_only: the first components of the names of tensors that are in the folder for a draft, and which this
            model's loader would not know: those of layers for multi-token prediction (`mtp.`).
        elsewhere: the checkpoint modules that only other pipeline-parallel ranks hold.

    """

    format: QuantFormat
    model_config: Any
    made_up: bool
    paths: ModelPaths
    loading: Loading
    layers: dict[str, LayerQuant] = field(default_factory=dict)
    absent_members: dict[str, Sequence[str]] = field(default_factory=dict)
    drafts_only: tuple[str, ...] = ()
    caches: dict[str, LayerQuant] = field(default_factory=dict)
    cache_tensors: dict[str, str] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, model: nn.Module, quant_format: QuantFormat, model_config: Any, made_up: bool, draft: bool = False
    ) -> "ServedModel":
        """The owner for a model that was just built, remembered until the model is gone."""
        modules = list(quant_format.modules) or guessed_modules(model, quant_format)
        paths = ModelPaths(model, modules)
        served = cls(quant_format, model_config, made_up, paths, Loading(model_config.model))
        missing = compat.paths_elsewhere(model)
        if missing:
            places = ((module, paths.paths_of(module)) for module in modules)
            served.elsewhere = frozenset(
                module for module, at in places if at and all(compat.is_elsewhere(path, missing) for path in at)
            )
        if not draft and _MTP not in dict(model.named_children()):
            served.drafts_only = (_MTP,)
        _served[model] = served
        return served

    @property
    def modules(self) -> Mapping[str, StoredForm]:
        """What the checkpoint stores, by module."""
        return self.format.modules

    def resolve(self, name: str, modules: Sequence[str], layer_class: str = "Linear") -> LayerQuant:
        """The format's answer about checkpoint modules; raises as QuantFormat.layer_quant."""
        return self.format.layer_quant(LayerQuery(name, modules=tuple(modules), layer_class=layer_class))

    def left_over(self) -> list[StoredForm]:
        """The quantised modules that belong to no layer."""
        claimed = {module for quant in self.layers.values() for module in quant.modules}
        return [
            form
            for module, form in self.modules.items()
            if module not in claimed and form.has("weight") and self.resolve(module, (module,)).quant_type is not None
        ]

    def log_report(self) -> None:
        """One line per kind of layer."""
        kinds = Counter(quant.quant_type or "FLOAT" for quant in [*self.layers.values(), *self.caches.values()])
        for quant_type, count in sorted(kinds.items()):
            logger.info("%s: %d layers %s", self.format.vllm_name, count, quant_type)


_served: "weakref.WeakKeyDictionary[nn.Module, ServedModel]" = weakref.WeakKeyDictionary()


def served_model(model: nn.Module) -> ServedModel | None:
    """The owner of a model that vLLM built in this process; None for a model of no checkpoint of ours."""
    return _served.get(model)


def layers_served_from(quant_format: QuantFormat | None) -> Mapping[str, LayerQuant]:
    """What was decided about the newest living model of this process that is served from an opened checkpoint."""
    found = [served for served in _served.values() if served.format is quant_format]
    return {**found[-1].layers, **found[-1].caches} if found else {}
