"""Models whose weights are not all in one place: spread over devices or offloaded by accelerate, over processes, or
stored as codes. The first can be hooked; the others are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechattr.errors import UnsupportedModelError

WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stored(module: Any, name: str) -> Tensor | None:
    """A weight of a module, wherever it is; `None` where the module has none of this name.

    Outside its own forward pass an offloaded module has its weights on the meta device. They are then read from where
    they lie (the CPU's memory, or a file) to the device that the module runs on, and kept by nobody but the caller.
    """
    value: Tensor | None = getattr(module, name, None)
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


def check_whole(model: Any) -> None:
    """Whether this process can see and read every weight of a model.

    Raises:
        UnsupportedModelError: a tensor-parallel or sharded model, weights stored as codes, or none at all.
    """
    asked = f"a hooked {type(model).__name__}"
    if (getattr(model, "_tp_size", None) or 1) > 1 or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise UnsupportedModelError(
            asked,
            "its weights are split over processes (tensor or data parallel): each process holds some of its heads",
            "load it in one process with device_map='auto', which puts whole blocks on each device",
        )
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
