"""Models whose weights are not all in one place: spread over devices or offloaded by accelerate, divided among
processes, or stored as codes. The last are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechattr.errors import UnsupportedModelError

WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stored(module: Any, name: str) -> Tensor | None:
    """A weight of a module, wherever it is; `None` where the module has none of this name.

    Outside its own forward pass an offloaded module has its weights on the meta device. They are then read from where
    they lie (the CPU's memory, or a file) to the device that the module runs on, and kept by nobody but the caller. Of
    a weight that is divided among processes, each gets all parts, for which all of them must ask.
    """
    value: Tensor | None = getattr(module, name, None)
    if value is not None and hasattr(value, "full_tensor"):
        whole: Tensor = value.full_tensor()
        return whole
    if value is None or not value.is_meta:
        return value
    from accelerate.utils import align_module_device

    with align_module_device(module):
        present: Tensor = getattr(module, name)
        return present


def runs_on(module: Any) -> torch.device:
    """The device on which a module computes, which is not that of its weights where they are offloaded."""
    given = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device: torch.device = module.weight.device if given is None else torch.empty(0, device=given).device
    return device


def check_weights(model: Any) -> None:
    """Whether the values of a model's weights can be read.

    Raises:
        UnsupportedModelError: weights stored as codes, or none at all.
    """
    asked = f"a hooked {type(model).__name__}"
    codes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype not in WEIGHTS}
    if codes or getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError(
            asked,
            f"its weights are quantised ({', '.join(sorted(codes)) or 'by its config'}): model.weight and the weights "
            "that scores of heads and edges are made of would be codes",
            "load the unquantised model with dtype='bfloat16', or dequantise it: model.dequantize()",
        )
    lost = [name for name, p in model.named_parameters() if p.is_meta and not _offloaded(model, name)]
    if lost:
        found = f"{lost[0]} is on the meta device, without a value anywhere"
        raise UnsupportedModelError(asked, found, "load its weights: from_pretrained, or load_state_dict(assign=True)")


def _offloaded(model: nn.Module, name: str) -> bool:
    return bool(getattr(getattr(model.get_submodule(name.rpartition(".")[0]), "_hf_hook", None), "offload", False))
