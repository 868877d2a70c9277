"""A folder with a saved state: without what saved_state.py imports, because any start of vLLM looks for one."""

from collections.abc import Mapping
from functools import cached_property

import torch

from quant_core import CheckpointError, CheckpointFolder
from quant_core.errors import listing
from quant_core.stored import StoredTensor

#: vLLM's load formats that read such a folder.
LOAD_FORMATS = ("sharded_state", "runai_streamer_sharded")

#: What the checkpoint stored that the state was made from: tensor name to [file, dtype, shape].
STORED = "stored_before_quant_processing.json"


class SavedFolder(CheckpointFolder):
    """A folder with a saved state, which describes the checkpoint that it was made from."""

    weight_files = ()  # of the checkpoint, of which there is none here

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What the checkpoint held.

        Raises:
            CheckpointError: if the folder does not say it.

        """
        if not self.files(STORED):
            raise CheckpointError(
                f"{self.path} holds no saved state of a quantised model",
                found=listing(self.files("*.safetensors")) or "no *.safetensors file",
                expected=f"{STORED}, which save_sharded_state writes where vllm-ascend-quant is installed",
                todo="leave --load-format out to load a checkpoint; or save the state again",
            )
        try:
            return {
                name: StoredTensor(name, tuple(map(int, shape)), _dtype(dtype), file)
                for name, (file, dtype, shape) in self.read_json(STORED).items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{STORED} is not what save_sharded_state writes", where=self.path) from error


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype
