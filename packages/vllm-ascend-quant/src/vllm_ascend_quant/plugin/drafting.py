"""Drafts that read the hidden states of a target whose weights are rotated (QuaRot)."""

from typing import Any

from vllm.config import VllmConfig

from quant_core import LimitError
from vllm_ascend_quant import installed, options
from vllm_ascend_quant.config import AscendQuantizationConfig

#: The option that says that a draft was made for the rotated hidden states.
OPTION = "rotated_draft"


def refuse_rotated_target(speculative: Any, load_config: Any, additional_config: Any) -> None:
    """Refuse a draft for the hidden states of the float model where the target's are rotated.

    A draft model with an embedding of its own reads none. Layers in the target's own folder were made with it.

    Raises:
        LimitError: names the rotation. Nothing would be wrong but the proposals, of which hardly one would be accepted.

    """
    target, draft = speculative.target_model_config, speculative.draft_model_config
    if (
        draft is None
        or draft.model == target.model
        or speculative.uses_draft_model()
        or target.quantization not in installed.methods()
    ):
        return
    config = VllmConfig.get_quantization_config(target, load_config)
    assert isinstance(config, AscendQuantizationConfig)
    assert config.format is not None
    rotation = config.format.rotation
    if rotation is None or options.is_set(additional_config, OPTION):
        return
    raise LimitError(
        f"{draft.model} drafts from the hidden states of {target.model}, which are rotated",
        found=rotation,
        expected=f"a target that is not rotated; the method {speculative.method!r} knows the float model's states",
        todo="use a draft model (method draft_model), the layers that draft (MTP) in the target's folder, or a target "
        f"that was quantised without rotation. For a draft made for these rotated weights: --additional-config "
        f'\'{{"ascend_quant": {{"{OPTION}": true}}}}\'',
    )
