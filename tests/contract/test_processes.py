"""Models whose heads and neurons are divided among processes: each process gets what one process alone would."""

from __future__ import annotations

import copy
import os
import re
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import prompt_cases
import pytest
import torch
from contract_cases import CASES, call
from devices import everything
from patching_cases import pairs_task
from torch import Tensor, distributed
from transformers.distributed import DistributedConfig

import mechattr as ma
from mechattr.errors import UnsupportedModelError
from mechattr.models import Batch, HookedHF
from mechattr.models.sharding import Split, _Cut, _Join
from mechattr.models.small import small_model

DIVIDED = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "mlp_pre", "mlp_pre_linear", "mlp_post")
# biases and groups of heads; one projection for q, k and v; experts; one projection for gate and linear input
FAMILIES = ("llama", "qwen2", "gpt_neox", "mixtral", "glm")
WHOLE = {"gpt_neox": ("mlp_pre_linear",), "mixtral": DIVIDED[8:], "glm": DIVIDED[8:]}  # in each process, or not there
# all others that transformers has a plan for, but for cohere, which does not run by it
OTHERS = (
    *("mistral", "ministral", "ministral3", "qwen3", "smollm3", "seed_oss", "helium", "ernie4_5", "cwm", "granite"),
    *("arcee", "apertus", "gemma", "gemma2", "gemma3", "vaultgemma", "phi3", "glm4", "olmo", "olmo2", "olmo3"),
    *("exaone4", "starcoder2", "nemotron", "jais2", "phi", "cohere2", "gpt_neox_sequential"),
    *("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"),
    *("llava", "llava_next", "mistral3", "internvl", "qwen2_vl", "qwen2_5_vl"),
)


# Sums over heads and neurons are sums of two halves here, which rounds otherwise: in float64 by 1.5e-15 of the largest
# entry, as was seen, and more where a sum cancels. Gemma's norms and Mixtral's router work in float32 in any dtype.
ROUNDING = dict.fromkeys(("gemma", "gemma2", "gemma3", "vaultgemma", "mixtral"), 1e-5)


def far(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float = 1e-12) -> list[str]:
    """The names of those that differ."""
    assert found.keys() == expected.keys()

    def differs(x: Tensor, y: Tensor) -> bool:
        return x.shape != y.shape or not torch.allclose(x, y, rtol=0, atol=rounding * float(y.abs().max()))

    return [name for name in expected if differs(found[name], expected[name])]


def scores(model: HookedHF, method: str) -> dict[str, Tensor]:
    """A method's tables; what was not measured, and so is NaN, as zeros."""
    if method in CASES:
        found = call(CASES[method], model, pairs_task(model))
    else:
        found = prompt_cases.call(prompt_cases.CASES[method], model, prompt_cases.rows_of(model))
    return {name: x.values.nan_to_num() for name, x in found.tensors.items()}


def pulled_back(model: HookedHF) -> dict[str, Tensor]:
    """Four backward passes from the end of the last block."""
    top = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    tape = model.tape(families.ragged("left"), gradients=("resid_post", "z", "q"))
    shape = (4, *tape._nodes[top].blank.shape)
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return tape.pull_backs({top: gradients}, last=True)


def over_summed(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> Any:
    """Every process has the whole gradient, and their sum is twice that."""
    gradient = gradient.clone()
    distributed.all_reduce(gradient, group=ctx.split.group)
    return backward(ctx, gradient)


def of_one_process(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Zeros where the parts of other processes are."""
    parts = [torch.zeros_like(gradient)] * ctx.split.ways
    parts[ctx.split.rank] = gradient
    return torch.cat(parts, ctx.axis), None, None


def _check_family(family: str, folder: Path) -> tuple[HookedHF, HookedHF]:
    own = small_model(family, torch.float64)
    settings: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    settings |= {"experts_implementation": "eager"} if "moe" in family or family in ("mixtral", "gpt_oss") else {}
    model = type(own).from_pretrained(folder / family, distributed_config=DistributedConfig(tp_size=2), **settings)
    here, there = HookedHF(own, name=family), HookedHF(model.eval(), name=family)
    assert there.info == here.info
    assert there.sites() == here.sites()
    batch = families.ragged("left")
    found = everything(there, batch)
    assert far(found, everything(here, batch), ROUNDING.get(family, 1e-12)) == []
    first = found["to blocks.0.hook_resid_pre"].clone()
    distributed.broadcast(first, 0)
    assert first.equal(found["to blocks.0.hook_resid_pre"])  # the same bits in every process
    assert there.fingerprint() == here.fingerprint()
    return here, there


def _check_llama(here: HookedHF, there: HookedHF) -> None:
    for method in ("attribution_patching", "activation_patching", "edge_attribution", *prompt_cases.CASES):
        assert far(scores(there, method), scores(here, method)) == []
    assert far(pulled_back(there), pulled_back(here)) == []
    assert far({"plain": ma.load(there, backend="plain").weight("blocks.1.mlp.W_out")},
               {"plain": ma.load(here, backend="plain").weight("blocks.1.mlp.W_out")}) == []  # fmt: skip
    batch = Batch.of(families.tokens())
    expected = everything(here, batch)
    for kind, wrong, missed in (
        (_Join, partial(over_summed, _Join.backward), {"to hook_embed", "to blocks.1.hook_resid_pre"}),
        (_Cut, of_one_process, {"to blocks.1.attn.hook_z", "to blocks.0.mlp.hook_post"}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "backward", staticmethod(wrong))
            assert missed <= set(far(everything(there, batch), expected))
    with pytest.MonkeyPatch.context() as patch:  # a part that is taken for the whole
        patch.setattr(there, "_split", None)
        sites = ("blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post")
        run = there.run(batch, record=sites).activations
        assert set(far({f"at {s}": run[s].values for s in sites}, {f"at {s}": expected[f"at {s}"] for s in sites})) == {
            f"at {s}" for s in sites
        }
    for model in (here, there):
        before = model.fingerprint()["weight_hash"]
        with torch.no_grad():
            model.model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        assert model.fingerprint()["weight_hash"] != before
    assert there.fingerprint() == here.fingerprint()


def _one_of_two(rank: int, port: int, folder: Path, names: tuple[str, ...]) -> None:
    """A process that holds half of every model."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for family in names:
            here, there = _check_family(family, folder)
            if family in FAMILIES:
                wanted = {name for name in DIVIDED if name not in WHOLE.get(family, ())}
                assert {ma.sites.parse(name)[0] for name in there._split.axes} == wanted
            if family == "llama":
                _check_llama(here, there)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow  # two processes that each import everything
@pytest.mark.timeout(400)  # half a minute each on two idle cores
@pytest.mark.parametrize("names", [FAMILIES, OTHERS[:20], OTHERS[20:]], ids=["shapes", "others", "more"])
def test_a_model_in_two_processes_is_the_model_in_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    for family in names:
        small_model(family, torch.float64).save_pretrained(tmp_path / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    torch.multiprocessing.spawn(_one_of_two, (port, tmp_path, names), 2)


def test_putting_together_what_one_process_has_changes_no_bit() -> None:
    here, there = (HookedHF(copy.deepcopy(small_model("gpt_neox", torch.float64))) for _ in range(2))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        kinds = {"attn_scores": 1, "pattern": 1} | dict.fromkeys(set(DIVIDED) - {"attn_scores", "pattern"}, 2)
        axes = {name: kinds[ma.sites.parse(name)[0]] for name in there.sites() if ma.sites.parse(name)[0] in kinds}
        there._split = Split(distributed.group.WORLD, 1, 0, axes)
        batch = families.ragged("left")
        expected, found = everything(here, batch), everything(there, batch)
        assert far(pulled_back(there), pulled_back(here)) == []  # one pass after the other, or all in one
    finally:
        distributed.destroy_process_group()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


# -- what is refused


class Mesh:
    """Of four processes, this the first, which never meet."""

    def __getitem__(self, _name: str) -> Mesh:
        return self

    def size(self) -> int:
        return 4

    def get_group(self) -> None: ...

    def get_local_rank(self) -> int:
        return 0


LAYERS = "model.layers.*."
COLUMNS, ROWS, WIDE = "colwise", "rowwise", "colwise_gather_output"
Q, K, V, O = (f"{LAYERS}self_attn.{short}_proj" for short in "qkvo")  # noqa: E741 (their names)
UP, DOWN = f"{LAYERS}mlp.up_proj", f"{LAYERS}mlp.down_proj"
HEADS = {Q: COLUMNS, K: COLUMNS, V: COLUMNS, O: ROWS}
REFUSED: dict[str, tuple[str, dict[str, str], str]] = {
    "uneven": ("llama", HEADS, "2 kv heads are divided among 4 processes, not evenly"),
    "style": ("llama", {f"{LAYERS}mlp": "sequence_parallel"}, "layers.0.mlp is divided by the style 'sequence_parall"),
    "halves": ("llama", {Q: COLUMNS}, "in ways that do not fit: q colwise, k whole, v whole, o whole"),
    "gathered": ("llama", {UP: WIDE, DOWN: ROWS}, "do not fit: gate whole, up colwise_gather_output, down rowwise"),
    "logits": ("llama", {"lm_head": COLUMNS}, "each process has the logits of a part of the vocabulary"),
    "norms": ("cohere", HEADS, "its norms of queries and keys are not those of single heads"),
    "joined": (
        "glm",
        {f"{LAYERS}mlp.gate_up_proj": COLUMNS, DOWN: ROWS},
        "the one projection to gate and linear input is divided",
    ),
    "blocks": ("phi3", {f"{LAYERS}self_attn.qkv_proj": COLUMNS, O: ROWS}, "its attention is divided, and not by heads"),
    "sources": ("t5", {}, "it has an encoder beside its decoder"),
}


def pretended(family: str, plan: Mapping[str, str], **also: int) -> Any:
    """A model that says that it is divided."""
    model = copy.deepcopy(small_model(family))
    model.config.distributed_config = DistributedConfig(tp_size=4, **also)
    model._tp_size, model._tp_plan, model._device_mesh = 4, dict(plan), Mesh()
    return model


@pytest.mark.parametrize(("family", "plan", "text"), REFUSED.values(), ids=REFUSED)
def test_a_division_that_no_site_can_be_put_together_of_is_refused(
    family: str, plan: Mapping[str, str], text: str
) -> None:
    fix = r"\n  fix: load it in one process with device_map='auto'"
    with pytest.raises(UnsupportedModelError, match=f"(?s)in parallel processes.*{re.escape(text)}.*{fix}"):
        ma.load(pretended(family, plan))


def test_other_divisions_are_refused() -> None:
    alone = copy.deepcopy(small_model("llama"))
    alone._tp_size = 2
    sharded = copy.deepcopy(small_model("llama"))
    sharded.model.norm.weight.device_mesh = SimpleNamespace()  # as a parameter of FSDP has
    for model in (alone, sharded):
        with pytest.raises(
            UnsupportedModelError, match="split over processes, and not by transformers' tensor parallel"
        ):
            ma.load(model)
    with pytest.raises(UnsupportedModelError, match="beside its tensors fsdp_size=2 divide it"):
        ma.load(pretended("llama", {}, fsdp_size=2))
    model = pretended("llama", {})
    model.model.norm.weight.device_mesh = SimpleNamespace()
    with pytest.raises(UnsupportedModelError, match=r"model.norm is divided without a style"):
        ma.load(model)
    model.config.model_type = "unheard"
    with pytest.raises(UnsupportedModelError, match="what they compute cannot be compared here\n  fix: say where"):
        ma.load(model)


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_backends_that_know_of_one_process_refuse(backend: str) -> None:
    model = pretended("llama", {})
    forward = model.model.layers[0].mlp.forward
    with pytest.raises(UnsupportedModelError, match=f"(?s)on the {backend} backend.*\n  fix: use backend='hf'"):
        ma.load(model, tokenizer=families.tokenizer(), backend=backend)
    assert model.model.layers[0].mlp.forward == forward  # nnsight would have put its own there
