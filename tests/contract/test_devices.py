"""Models whose weights are elsewhere: on another device, on two, in files; and those that cannot be hooked for it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from accelerate import dispatch_model
from contract_cases import CASES, Case, call
from devices import ONE, TWO, Pretended, everything, moved
from patching_cases import pairs_task
from prompt_cases import CASES as PROMPTS
from prompt_cases import PromptCase, rows_of
from prompt_cases import call as ask

import mechattr as ma
from mechattr.errors import SettingError, UnsupportedModelError
from mechattr.models import Batch, HookedHF
from mechattr.models.small import small_model
from mechattr.models.taps import Taps

# of each way to be built one: plain, with experts, with attention of its own, with an encoder beside the decoder
BUILDS = ("llama", "mixtral", "bloom", "t5")
OTHERS = tuple(name for name in families.EVERY if name not in BUILDS)


def spread(family: str) -> Any:
    """A small model whose first block and embeddings are on one device, and everything else on another; a head that
    shares the embedding's weight is with it."""
    model: Any = copy.deepcopy(small_model(family))
    blocks = [name for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()]
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    on = {name: ONE if name.endswith(".0") else TWO for name in blocks}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    shared = {id(p) for p in head.parameters()} if head.weight is embedding else set()
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(block.startswith(name and f"{name}.") for block in blocks):  # around the blocks: what it has of its own
            on |= {f"{name}.{n}".strip("."): ONE for n in (*module._parameters, *module._buffers)}
        elif own and not any(name.startswith(f"{block}.") for block in blocks):
            first = "embed" in name or isinstance(module, torch.nn.Embedding) or not shared.isdisjoint(map(id, own))
            on[name] = ONE if first else TWO
    return dispatch_model(model, on, main_device=ONE)


@cache
def model_on(place: str, family: str = "llama") -> HookedHF:
    """The same small model on the host, on one other device, or spread over two."""
    if place == "two":
        return HookedHF(spread(family))
    model = copy.deepcopy(small_model(family))
    return HookedHF(moved(model, ONE) if place == "one" else model)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # names of weights, which are no modules
@pytest.mark.parametrize("family", [*BUILDS, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])  # slow: many
def test_a_model_on_two_devices_is_the_model_on_one(family: str) -> None:
    with Pretended():
        here, there = model_on("host", family), model_on("two", family)
        assert {str(p.device) for p in there.model.parameters()} >= {"cpu:1", "cpu:2"}
        batch = families.batch_of(family, families.tokens())
        expected, found = everything(here, batch), everything(there, batch)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        # the same bits; copies on the way back change the order in which a gradient of several parts is added up
        rounding = 4e-6 * float(x.abs().max()) if name.startswith(("to ", "ruled ")) else 0
        torch.testing.assert_close(found[name], x, rtol=0, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("place", [pytest.param("one", marks=pytest.mark.slow), "two"])  # slow: a part of the other
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_method_gives_on_every_device_what_it_gives_on_the_host(case: Case, place: str) -> None:
    with Pretended():
        here, there = (call(case, model, pairs_task(model)) for model in (model_on("host"), model_on(place)))
        assert there.settings == here.settings
        for name, table in here.tensors.items():
            torch.testing.assert_close(there.tensors[name].values.cpu(), table.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", [pytest.param("one", marks=pytest.mark.slow), "two"])  # slow: a part of the other
@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS)
def test_a_method_of_prompts_gives_on_every_device_what_it_gives_on_the_host(case: PromptCase, place: str) -> None:
    with Pretended():
        models = (model_on("host"), model_on(place))
        here, there = (ask(case, model, rows_of(model).to(model.device)) for model in models)
        assert there.settings == here.settings
        for name, table in here.tensors.items():
            torch.testing.assert_close(there.tensors[name].values.cpu(), table.values, rtol=0, atol=0, equal_nan=True)


def test_pretended_devices_refuse_what_devices_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pretended():
        for wrong in (lambda: torch.ones(2, device=ONE) + torch.ones(2), lambda: torch.ones(2, device=ONE).numpy()):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                wrong()
        assert (torch.ones(2, device=ONE).to(TWO) + 1).device == TWO
        model = model_on("two")
        batch = Batch.of(families.tokens())
        with pytest.raises(SettingError, match=r"tokens on cpu, model on cpu:1\n  fix: .*batch.to\(device\)"):
            model.run(batch)
        # sites that are tapped where their block is: what comes out lies on two devices, and a method mixes them
        monkeypatch.setattr(Taps, "__call__", Taps._pass)
        with pytest.raises(RuntimeError, match="on the same device"):
            call(CASES["attribution_patching"], model, pairs_task(model))


# -- weights in files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model("llama").save_pretrained(path)
    families.tokenizer().save_pretrained(path)
    return path


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "block": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"},
    "whole": dict.fromkeys(PARTS, "disk"),
}


@pytest.mark.parametrize("which", MAPS)
def test_a_model_with_weights_on_disk_is_the_model_in_memory(folder: Path, which: str) -> None:
    there: Any = ma.load(folder, device_map=MAPS[which])
    away = {name for name, p in there.model.named_parameters() if p.is_meta}
    assert away
    batch = Batch.of(families.tokens())
    expected, found = everything(model_on("host"), batch), everything(there, batch)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")  # the same bits
    assert there.fingerprint()["weight_hash"] == model_on("host").fingerprint()["weight_hash"]
    assert there.norm("ln_final").weight.equal(model_on("host").norm("ln_final").weight)
    assert {name for name, p in there.model.named_parameters() if p.is_meta} == away  # what was read is let go
    task = pairs_task(there)
    for name in ("attribution_patching", "edge_attribution"):
        here, scores = (call(CASES[name], model, task) for model in (model_on("host"), there))
        for kind, table in here.tensors.items():
            torch.testing.assert_close(scores.tensors[kind].values, table.values, rtol=0, atol=0, equal_nan=True)


def test_weights_on_the_meta_device_are_what_is_seen_without_reading_them(folder: Path) -> None:
    there: Any = ma.load(folder, device_map=MAPS["block"])
    assert there.model.model.layers[1].self_attn.o_proj.weight.is_meta
    assert there.weight("blocks.1.attn.W_O").equal(model_on("host").weight("blocks.1.attn.W_O"))


def test_load_refuses_maps_that_do_not_fit(folder: Path) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "word": ({"device_map": "nonsense"}, r"device_map='nonsense'.*found nonsense.*\n  fix: use 'auto'"),
        "part": ({"device_map": {"model.norm": "disk"}}, "does not give any device for .*embed_tokens"),
        "both": ({"device_map": "auto", "device": "cpu"}, "device='cpu' as well, which is one device for all"),
        "plain": ({"device_map": "auto", "backend": "plain"}, "only backend='hf' spreads a model, this is 'plain'"),
    }
    if not torch.cuda.is_available():
        wrong["cuda"] = ({"device_map": {"": "cuda:0"}}, "(?i)cuda")
    for settings, text in wrong.values():
        with pytest.raises(SettingError, match=f"(?s){text}"):
            ma.load(folder, **settings)
    with pytest.raises(SettingError, match="a model that is loaded already\n  fix: load it with a device_map by trans"):
        ma.load(small_model("gpt2"), device_map="auto")


# -- what cannot be hooked


def test_models_that_this_process_cannot_read_are_refused() -> None:
    class Coded(torch.nn.Linear):
        """A linear map whose weight is kept in eight bits of floating point."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    def coded(model: Any) -> None:
        layer = Coded(24, 24, bias=False)
        layer.weight = torch.nn.Parameter(torch.ones(24, 24).to(torch.float8_e4m3fn), requires_grad=False)
        model.model.layers[0].self_attn.o_proj = layer

    def configured(model: Any) -> None:
        model.config.quantization_config = {"quant_method": "awq"}

    def empty(model: Any) -> None:
        model.lm_head.to("meta")

    reasons = {
        coded: r"quantised \(float8_e4m3fn\): .* would be codes\n  fix: load the unquantised model with dtype=",
        configured: r"quantised \(by its config\)",
        empty: "lm_head.weight is on the meta device, without a value anywhere",
    }
    for change, text in reasons.items():
        model = copy.deepcopy(small_model("llama"))
        change(model)
        with pytest.raises(UnsupportedModelError, match=f"(?s)a hooked LlamaForCausalLM.*{text}"):
            ma.load(model)
