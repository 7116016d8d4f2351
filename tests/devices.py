"""Devices that are not there: tensors that say they are on `cpu:1` or `cpu:2`, and refuse to meet others as CUDA's do.

The numbers are the CPU's, so that whatever runs on a GPU, or is spread over two, can be compared bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mechattr.models import Batch, HookedHF
from mechattr.models.base import Start
from mechattr.models.edits import Edit
from mechattr.models.operators import Add, Set, Zero
from mechattr.models.rules import Rules

HOST, ONE, TWO = (torch.device(name) for name in ("cpu", "cpu:1", "cpu:2"))
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class Placed(torch.Tensor):
    """A tensor of the host under the name of another device."""

    _value: torch.Tensor

    @staticmethod
    def __new__(cls, value: Any, device: Any = None, requires_grad: bool = False) -> Placed:
        if isinstance(value, Placed):  # as a new parameter is made of an old one
            return value.detach().requires_grad_(requires_grad)
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, value.size(), device=device, **layout)
        out._value = value
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy: copy it to the host first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self._value.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self._value!r}, {self.device})"


class Pretended(TorchDispatchMode):
    """Within it, `.to("cpu:1")` and `device="cpu:1"` make tensors of that device."""

    def __enter__(self) -> Any:
        for name in ("tensor", "as_tensor"):  # which copy to the CPU without a call that a mode sees
            setattr(torch, name, partial(_made, getattr(torch, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name in ("tensor", "as_tensor"):
            setattr(torch, name, getattr(torch, name).args[0])
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _made(make: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    made = args[0] if isinstance(args[0], Placed) else make(*args, **kwargs)
    return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if func in MOVES:
        here = args[0].device
    else:
        must = tree_flatten(args[0])[0] + ([args[2]] if len(args) > 2 else []) if func in INDEXED else given
        places = {x.device for x in must if isinstance(x, torch.Tensor) and not (x.ndim == 0 and x.device == HOST)}
        if func in INDEXED:
            places |= {x.device for x in args[1] if x is not None and x.device != HOST}
        if len(places) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {places}")
        here = next(iter(places), HOST)
    wanted = kwargs.get("device")
    if wanted is not None:
        here, kwargs = torch.device(wanted), {**kwargs, "device": HOST}
    plain = tree_map(lambda x: x._value if isinstance(x, Placed) else x, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if here == HOST:
        return out
    back = {id(x._value): x for x in given if isinstance(x, Placed)}  # what was written to is what came in
    return tree_map(lambda x: _named(x, here, back), out)


def _named(x: Any, here: torch.device, back: dict[int, Placed]) -> Any:
    if not isinstance(x, torch.Tensor) or isinstance(x, Placed):
        return x
    return back[id(x)] if id(x) in back else Placed(x, here)


def moved(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The same model with every weight there, as `model.to(device)` does on devices that are there."""
    seen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda x, _: x)):
            for name, x in held.items():
                if x is not None:
                    held[name] = seen.setdefault(id(x), wrap(x.detach().to(device), False))
    return model


def everything(model: HookedHF, batch: Batch) -> dict[str, torch.Tensor]:
    """Runs of every kind of a model that may be anywhere, their results on the host."""
    batch, sites, found = batch.to(model.device), model.sites(), {}
    run = model.run(batch, record=sites, metric=families.probe, gradients=sites)
    found |= {f"at {name}": x.values for name, x in run.activations.items()}
    found |= {f"to {name}": x.values for name, x in run.gradients.items()}
    found |= {"logits": run.logits, "metric": run.metric}
    edits = [Edit("z", Zero(), layers=[1], heads=[1], positions=[-1]), Edit("resid_post", Add(torch.ones(1)), rows=[0])]
    edits += [Edit("pattern", Set(run.activations), layers=[1])] * (not model.info.n_encoder_layers)
    if not model.info.n_experts:
        edits.append(Edit("mlp_post", Add(torch.tensor(3.0)), layers=[0], neurons=[model.info.d_mlp - 1]))
    found["edited"] = model.run(batch, edits=edits).logits
    rules = Rules.gim() if not model.info.n_experts else Rules(norm="frozen", temperature=2.0)
    ruled = model.run(batch, metric=families.probe, gradients="resid_pre", rules=rules, checkpoint=True)
    found |= {f"ruled {name}": x.values for name, x in ruled.gradients.items()}
    start = Start(1, run.activations["resid_pre", 1].values * 1.1)
    found["started"] = model.run(batch, start=start).logits
    for name in ("blocks.1.attn.W_O", "blocks.1.attn.b_O", "embed.W_E", "unembed.W_U"):
        found[name] = model.weight(name)
    assert {x.device for x in found.values()} == {model.device}  # everything comes out where the tokens went in
    if not model.info.encoder:
        found["generated"] = model.generate(batch, edits=edits[:1], max_new_tokens=4, do_sample=False).tokens
    return {name: x.cpu() for name, x in found.items()}
