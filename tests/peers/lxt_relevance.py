"""`python lxt_relevance.py FAMILY VARIANT TARGET FOIL IDS...`: token relevance of a small model by LXT, as JSON.

LXT patches classes of torch and transformers for the whole process, for good, so that each comparison is a process.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers.pytorch_utils


class Interface(dict[str, Any]):
    """The attention functions that LXT 2.1 leaves as a plain dict, which transformers now asks by method."""

    def get_interface(self, name: str, default: Any) -> Any:
        return self.get(name, default)


def main(family: str, variant: str, target: int, foil: int, ids: list[int]) -> list[float]:
    # what LXT 2.1 imports, and does not need here: a name that transformers dropped, and vision models
    transformers.pytorch_utils.find_pruneable_heads_and_indices = None
    sys.modules |= {"torchvision": MagicMock(), "torchvision.models": MagicMock()}
    efficient, maps = import_module("lxt.efficient"), import_module(f"lxt.efficient.models.{family}")
    code: Any = import_module(f"transformers.models.{family}.modeling_{family}")
    efficient.monkey_patch(code, maps.cp_LRP if variant == "cp" else maps.attnLRP)
    code.ALL_ATTENTION_FUNCTIONS = Interface(code.ALL_ATTENTION_FUNCTIONS)
    from mechattr.models.small import small_model

    model = small_model(family)
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    last = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(last[target] - last[foil], embeddings)
    relevance: list[float] = (embeddings * gradient).sum(-1)[0].tolist()
    return relevance


if __name__ == "__main__":
    family, variant, *numbers = sys.argv[1:]
    target, foil, *ids = map(int, numbers)
    sys.stdout.write(json.dumps(main(family, variant, target, foil, ids)))
