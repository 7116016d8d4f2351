"""Encoder-decoder models: cross-attention, positions of the source, generation, and methods."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch

import mechattr as ma
from mechattr.engines.executors import InProcess
from mechattr.errors import (
    AlignmentError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models import Add, Batch, Edit, HookedHF, Set, Start, Zero
from mechattr.models.small import small_model
from mechattr.sites import Node, full_name, of_source, parse

every_family = pytest.mark.parametrize("family", families.SOURCED)
ANSWERED = [
    {"clean_tokens": [9, 17, 33, 1], "corrupt_tokens": [9, 21, 33, 1], "answer": 40, "foil": 41},
    {"clean_tokens": [11, 17, 30, 1], "corrupt_tokens": [12, 17, 30, 1], "answer": 22, "foil": 6},
]


@every_family
def test_what_cross_attention_writes_is_its_weights_applied_to_the_encoders_output(family):
    """z = pattern v and out = z W_O + b_O, with k = x W_K + b_K, v = x W_V + b_V of the encoder's last stream x."""
    model, batch = families.hooked(family, torch.float64), families.ragged_of(family)
    last = model.info.n_encoder_layers - 1
    top = "encoder.ln_final.hook_out" if model.supports("encoder_ln_final") else full_name("encoder_resid_post", last)
    sites = ("cross_q", "cross_k", "cross_v", "cross_pattern", "cross_z", "cross_attn_out")
    seen = model.run(batch, record=(*sites, top)).activations
    real = batch.source.mask
    for layer in range(model.info.n_layers):
        _, k, v, pattern, z, out = (seen[full_name(site, layer)].values for site in sites)
        weights = {
            n: model.weight(f"blocks.{layer}.cross_attn.{n}") for n in ("W_K", "b_K", "W_V", "b_V", "W_O", "b_O")
        }
        for x, m in ((k, "K"), (v, "V")):
            wanted = torch.einsum("bsm,hmd->bshd", seen[top].values, weights[f"W_{m}"]) + weights[f"b_{m}"]
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-10)  # sums in float64
        torch.testing.assert_close(z, torch.einsum("bhqs,bshd->bqhd", pattern, v), rtol=0, atol=1e-10)
        wanted = torch.einsum("bqhd,hdm->bqm", z, weights["W_O"]) + weights["b_O"]
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
        assert not pattern.masked_select(~real[:, None, None, :]).any()  # padding of the source is not looked at


@every_family
def test_weights_of_encoder_and_unembedding(family):
    model, batch = families.hooked(family, torch.float64), families.batch_of(family, families.tokens())
    run = model.run(batch, record=("encoder_embed", "encoder_v", "encoder_ln1", "encoder_resid_pre", "resid_post"))
    seen = run.activations
    table = model.weight("encoder.embed.W_E")
    torch.testing.assert_close(seen["encoder.hook_embed"].values, table[batch.source.tokens], rtol=0, atol=1e-12)
    read = seen["encoder_resid_pre" if model.info.post_norm else "encoder_ln1", 0].values
    wanted = torch.einsum("bsm,hmd->bshd", read, model.weight("encoder.0.attn.W_V")) + model.weight(
        "encoder.0.attn.b_V"
    )
    torch.testing.assert_close(seen["encoder_v", 0].values, wanted, rtol=0, atol=1e-10)  # sums in float64
    last = seen["resid_post", model.info.n_layers - 1].values
    norm = None if model.info.post_norm else model.norm("ln_final")
    stream = last if norm is None else norm(last)
    wanted = stream @ model.weight("unembed.W_U") + model.weight("unembed.b_U")
    torch.testing.assert_close(run.logits, wanted, rtol=0, atol=1e-5)  # RMS norms of transformers work in float32
    with pytest.raises(UnknownNameError, match="no such weight"):
        model.weight("encoder.unembed.W_U")


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_the_tokens_of_the_side_that_a_site_has(family, side):
    """An edit at position -1 of a source site changes the last source token of each row, and nothing else there."""
    model, batch = families.hooked(family), families.ragged_of(family, side)
    for site in ("encoder_resid_pre", "cross_k", "cross_z", "encoder_pattern", "cross_pattern"):
        name = full_name(site, 1)
        plain = model.run(batch, record=name).activations[name]
        edited = model.run(batch, record=name, edits=[Edit(name, Add(1.0), positions=[-1])]).activations[name]
        column = 2 if site.endswith("pattern") else 1
        found = (edited.values != plain.values).movedim(column, 1).flatten(2).any(-1)
        counted = batch if plain.axes[column] in ("pos", "query") else batch.source
        wanted = torch.zeros_like(counted.mask)
        wanted[torch.arange(3), counted.columns(-1)] = True
        assert torch.equal(found, wanted), site


def test_control_source_positions_counted_on_the_decoder_select_other_columns():
    batch = families.ragged_of("t5", "right")
    assert not torch.equal(batch.columns(-1), batch.source.columns(-1))


def test_positions_and_layers_are_checked_against_their_own_side():
    model, batch = families.hooked("mt5"), families.batch_of("mt5", families.tokens())  # 7 and 5 tokens; 3 and 2 layers
    model.run(batch, edits=[Edit("encoder_z", Zero(), layers=[2], positions=[4])])
    model.run(batch, edits=[Edit("z", Zero(), layers=[1], positions=[6])])
    with pytest.raises(SettingError, match=r"position 6\n  found: rows of 5 to 5 real tokens"):
        model.run(batch, edits=[Edit("encoder_z", Zero(), positions=[6])])
    with pytest.raises(SettingError, match=r"layers=\[2\]\n  found: the model's layers has 0 to 1"):
        model.run(batch, edits=[Edit("z", Zero(), layers=[2])])


@every_family
def test_the_encoder_sees_all_of_the_source_and_the_decoder_only_what_came_before(family):
    model, batch = families.hooked(family), families.batch_of(family, families.tokens())
    patterns = model.run(batch, record=("pattern", "cross_pattern", "encoder_pattern")).activations
    for name in patterns:
        x = patterns[name].values
        ahead = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        assert bool((x[..., ahead] > 0).any()) == of_source(parse(name)[0]), name


@every_family
def test_edits_of_the_source_act_on_all_of_a_generation(family):
    """Keys and values of cross-attention are computed once and kept: an edit there acts in every step, as without."""
    model, batch = families.hooked(family), families.ragged_of(family, "left")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain = model.generate(batch, **settings).tokens
    for site, positions in (("cross_v", None), ("cross_k", [0, -1]), ("encoder_resid_post", [0]), ("cross_z", [-1, 8])):
        width = 24 if site.startswith("encoder") else 6
        edit = Edit(site, Add(4 * torch.randn(width, generator=torch.Generator().manual_seed(1))), positions=positions)
        cached = model.generate(batch, edits=[edit], **settings).tokens
        assert torch.equal(cached, model.generate(batch, edits=[edit], use_cache=False, **settings).tokens), site
        assert site != "cross_v" or not torch.equal(cached, plain)
    beams = model.generate(batch, edits=[Edit("cross_v", Add(0.0), positions=[-1])], num_beams=2, **settings).tokens
    assert torch.equal(beams, model.generate(batch, num_beams=2, **settings).tokens)


def test_generation_steps_are_the_runs_of_what_was_written():
    """Greedy tokens are the largest logits of runs whose decoder rows grow, under the same edit of the source."""
    model, batch = families.hooked("t5"), families.batch_of("t5", families.tokens(2, 3))
    edit = Edit("cross_v", Zero(), positions=[0], heads=[1])
    made = model.generate(batch, edits=[edit], max_new_tokens=4, do_sample=False, eos_token_id=None).tokens
    for end in range(3, 7):
        rows = replace(Batch.of(made[:, :end]), source=batch.source)
        assert torch.equal(model.run(rows, edits=[edit]).logits[:, -1].argmax(-1), made[:, end])


def test_batches_without_a_source_or_with_one_too_many():
    batch = families.batch_of("t5", families.tokens())
    with pytest.raises(
        SettingError, match=r"a batch without a source, which its encoder reads\n  fix: use model.tokenize"
    ):
        families.hooked("t5").run(replace(batch, source=None))
    with pytest.raises(SettingError, match=r"without an encoder beside its decoder\n  found: a batch with a source"):
        families.hooked("gpt2").run(batch)
    with pytest.raises(SettingError, match=r"3 rows and a source of 2\n  fix: give one source row for each row"):
        replace(batch, source=batch.source.rows([0, 1]))
    part = batch.rows([2, 0]).to("cpu")
    assert torch.equal(part.source.tokens, batch.source.tokens[[2, 0]])
    with pytest.raises(SettingError, match="token id 99"):
        families.hooked("t5").run(replace(batch, source=Batch.of(torch.full((3, 2), 99))))


def test_texts_become_the_source_and_targets_follow_the_first_token():
    model = HookedHF(small_model("t5"), families.tokenizer())
    batch = model.tokenize([" a b", " a"])
    assert batch.tokens.tolist() == [[3], [3]]
    assert batch.source.tokens[batch.source.mask].tolist() == [0, 5, 6, 0, 5]
    assert batch.prompt is batch.source
    batch = model.tokenize([" a b", " a"], targets=[" b", " a b"], padding_side="left")
    assert batch.tokens[batch.mask].tolist() == [3, 6, 3, 5, 6] and batch.padding_side == "left"
    with pytest.raises(SettingError, match="1 targets for 2 texts"):
        model.tokenize([" a b", " a"], targets=[" b"])
    with pytest.raises(SettingError, match="gpt2 has no encoder"):
        HookedHF(small_model("gpt2"), families.tokenizer()).tokenize(" a", targets=" b")


def test_models_that_cannot_be_told_apart_are_refused():
    shared = small_model("bart")
    shared.set_input_embeddings(shared.get_input_embeddings())
    with pytest.raises(UnsupportedModelError, match="encoder and decoder share one embedding module"):
        HookedHF(shared)
    config = families.configs()["bart"]
    config.decoder_ffn_dim = 48
    with pytest.raises(UnsupportedModelError, match="encoder_ffn_dim=40 and decoder_ffn_dim=48"):
        ma.models.architectures.family_of(config)


def test_patching_heads_of_cross_attention_is_one_whole_run_each():
    model = families.hooked("t5", torch.float64)
    task = ma.tasks.from_pairs(model, ANSWERED)
    found = ma.activation_patching(model, task, sites=("cross_z", "z"), progress=False)
    other = model.run(task.corrupt, record=("cross_z", "z")).activations
    base = model.run(task.clean, metric=task.metric).metric
    for node in (n for n in found.nodes() if n.site == "cross_z"):
        edit = Edit("cross_z", Set(other), layers=[node.layer], heads=[node.head], positions=[node.pos])
        effect = model.run(task.clean, edits=[edit], metric=task.metric).metric - base
        # sums in float64, and RMS norms in float32
        torch.testing.assert_close(found.value(node), float(effect.abs().mean()), rtol=1e-5, atol=1e-6)
    assert found.scores["cross_z"].values.max() > 0.01
    # the decoder's first block reads its own tokens only, which are the same on both prompts: a control of the values
    assert not found.scores["z"].sel(layer=0).values.any()


SOURCE_SITES = ("encoder_embed", "encoder_z", "encoder_pattern", "encoder_mlp_out", "cross_k", "cross_v")
UNEVEN = [
    ANSWERED[0],
    {"clean_tokens": [11, 17, 30, 8, 1], "corrupt_tokens": [12, 17, 30, 8, 1], "answer": 22, "foil": 6},
]


def by_hand(model, task, node, *, shift=0, start=False):
    """A node's mean effect, with an edit for each pair."""
    effects = []
    for pair in range(len(task)):
        clean, corrupt = (side.rows([pair]) for side in (task.clean, task.corrupt))
        other = model.run(corrupt, record=node.site).activations
        base = model.run(clean, metric=task.metric, record="resid_pre")
        which = {
            name: None if value is None else [value] for name, value in (("layers", node.layer), ("heads", node.head))
        }
        place = None if node.pos is None else [(node.pos + shift) % int(clean.source.lengths[0])]
        begin = Start(node.layer, base.activations["resid_pre", node.layer].values) if start else None
        edits = [Edit(node.site, Set(other), positions=place, **which)]
        effects.append(float(model.run(clean, edits=edits, metric=task.metric, start=begin).metric - base.metric))
    return sum(effects) / len(effects)


@every_family
@pytest.mark.parametrize("positions", ["aligned", "all"])
def test_the_effect_of_a_node_of_the_source_is_that_of_an_edit(family, positions):
    model = families.hooked(family, torch.float64)
    task = ma.tasks.from_pairs(model, ANSWERED if positions == "aligned" else UNEVEN)
    found = ma.activation_patching(model, task, sites=SOURCE_SITES, positions=positions, progress=False)
    close = {"rtol": 0, "atol": 1e-5}  # RMS norms of transformers work in float32
    nodes = found.top(20)
    assert {node.site for node in nodes} > {"encoder_z", "cross_v"}
    for node in nodes:
        torch.testing.assert_close(found.value(node, "signed"), by_hand(model, task, node), **close)
    above = next(n for n in nodes if n.layer == 1 and n.site.startswith("encoder_"))
    with pytest.raises(AssertionError):  # control: a run that starts at the decoder's block of the same number
        torch.testing.assert_close(found.value(above, "signed"), by_hand(model, task, above, start=True), **close)
    if positions == "aligned":
        with pytest.raises(AssertionError):  # control: the position beside it
            torch.testing.assert_close(
                found.value(nodes[0], "signed"), by_hand(model, task, nodes[0], shift=1), **close
            )


@every_family
def test_estimates_at_the_source_are_the_effects_of_a_small_step(family):
    """A step that is small enough leaves the metric linear in every node, whatever the model."""
    model, step, sites = families.hooked(family, torch.float64), 1e-6, (*SOURCE_SITES, "cross_z")
    task = ma.tasks.from_pairs(model, ANSWERED)
    with families.widened():
        here, there = (model.run(side, record=sites).activations for side in (task.clean, task.corrupt))
        near = ma.Cache({n: here[n] + step * (there[n] - here[n]) for n in here}, settings={}, provenance={})
        atp = ma.attribution_patching(model, task, sites=sites, variant="atp", source=near, progress=False)
        exact = ma.activation_patching(model, task, sites=sites, source=near, progress=False)
    close = {"rtol": 1e-3, "atol": 1e-6}  # second order in the step, and differences of metrics over the step
    for site in sites:
        found, wanted = (result.signed[site].values / step for result in (atp, exact))
        torch.testing.assert_close(found, wanted, **close)
        if site != "cross_z":
            assert atp.signed[site].axes[1 if site != "encoder_embed" else 0] == "source"
            with pytest.raises(AssertionError):  # control: an estimate of the next position
                torch.testing.assert_close(found.roll(1, 0 if site == "encoder_embed" else 1), wanted, **close)


def test_positions_of_nodes_and_what_they_mean_are_those_of_their_side(tmp_path):
    model = families.hooked("mt5")  # 3 layers of the encoder, 2 of the decoder
    task = ma.tasks.from_pairs(model, ANSWERED)
    found = ma.attribution_patching(model, task, sites=("encoder_z", "cross_z", "cross_v"), progress=False)
    assert [found.scores[site].axes[1] for site in found.scores] == ["source", "pos", "source"]
    assert [found.scores[site].shape[:2] for site in found.scores] == [(3, 4), (2, 1), (2, 4)]
    exact = ma.activation_patching(model, task, nodes=found.top(9), progress=False)
    assert exact.nodes() == sorted(found.top(9))
    found.save(tmp_path / "result.safetensors")
    assert ma.open(tmp_path / "result.safetensors").top(5) == found.top(5)
    row = found.to_pandas().iloc[0]
    assert found.value(Node(row.site, int(row.layer), row.pos, int(row["head"]))) == row.score
    assert found.plot().get_xlabel() == "head (cross_z)"
    found = ma.attribution_patching(model, task, sites=("encoder_z", "cross_attn_out"), progress=False)
    assert len(found.plot().get_yticklabels()) == 3  # the longer of two stacks
    with pytest.raises(SettingError, match=r"node L2H0 encoder_z @4\n  found: positions of this task: 0, 1, 2, 3\n"):
        ma.activation_patching(model, task, nodes=[Node("encoder_z", 2, 4, 0)])
    with pytest.raises(SettingError, match=r"node L0H0 cross_z @1\n  found: positions of this task: 0\n"):
        ma.activation_patching(model, task, nodes=[Node("cross_z", 0, 1, 0)])
    with pytest.raises(SettingError, match="layer 3: layers run from 0 to 2"):
        ma.activation_patching(model, task, nodes=[Node("encoder_z", 3, 0, 0)])
    with pytest.raises(SettingError, match="layer 2: layers run from 0 to 1"):
        ma.activation_patching(model, task, nodes=[Node("cross_v", 2, 0, 0)])


def test_sources_that_do_not_align_leave_merged_positions():
    model = families.hooked("t5")
    uneven = ma.tasks.from_pairs(model, UNEVEN)
    ma.activation_patching(model, uneven, sites="cross_z", progress=False)  # the decoder's rows align
    for method in (ma.activation_patching, ma.attribution_patching):
        text = r"table by source position over the 2 pairs.*\n.*sources of 4 to 5 tokens.*\n  fix: use positions='all'"
        with pytest.raises(AlignmentError, match=text):
            method(model, uneven, sites="cross_v")
        with pytest.raises(AlignmentError, match=r"positions='named' in a source\n.*its decoder\n.*positions='all'"):
            method(model, uneven, sites=("cross_z", "cross_v"), positions="named")
    # answers of several tokens are read by the decoder: its rows do not align, and sources do
    answers = [{**pair, "answer": answer} for pair, answer in zip(ANSWERED, ([40, 41], [22]), strict=True)]
    task = ma.tasks.from_pairs(model, answers, metric="sequence_log_probability")
    assert task.clean.lengths.tolist() == [2, 1]
    assert ma.attribution_patching(model, task, sites="cross_v", progress=False).scores["cross_v"].shape == (2, 4, 4)


@pytest.mark.parametrize("family", ["mt5", "bart"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_what_takes_the_place_of_an_ablated_node_of_the_source(family, kind):
    model, sites = families.hooked(family, torch.float64), ("encoder_z", "cross_v", "cross_z")
    task = ma.tasks.from_pairs(model, ANSWERED)
    found = ma.ablation(model, task, kind=kind, sites=sites, progress=False)
    seen = model.run(task.clean, record=sites).activations
    base = model.run(task.clean, metric=task.metric).metric
    put = {
        "zero": torch.zeros_like,
        "mean": lambda x: x.mean(0, keepdim=True).expand_as(x),
        "resample": lambda x: x.flip(0),  # of two pairs, each takes the other's
    }

    def by_edit(node, kind, shift=0):
        values = put[kind](seen[node.site, node.layer].values).roll(shift, 1)

        def replace_by(_x, _place):
            return values[:, [node.pos]][:, :, [node.head]]

        edit = Edit(full_name(node.site, node.layer), replace_by, positions=[node.pos], heads=[node.head])
        return float((model.run(task.clean, edits=[edit], metric=task.metric).metric - base).mean())

    close = {"rtol": 0, "atol": 1e-5}  # RMS norms of transformers work in float32
    for node in found.nodes():
        torch.testing.assert_close(found.value(node, "signed"), by_edit(node, kind), **close)
    node = next(n for n in found.top(99) if n.site == "cross_v")
    for wrong in ((kind, 1), ({"zero": "mean", "mean": "resample", "resample": "zero"}[kind], 0)):
        if wrong == ("zero", 1):
            continue  # zeros are the same everywhere
        with pytest.raises(AssertionError):  # control: the value of the next position, and another kind
            torch.testing.assert_close(found.value(node, "signed"), by_edit(node, *wrong), **close)


def test_ablation_of_a_source_in_blocks_with_a_reference_and_with_merged_positions():
    model = families.hooked("t5", torch.float64)
    task, other = (ma.tasks.from_pairs(model, pairs) for pairs in ([*ANSWERED, ANSWERED[0]], ANSWERED[::-1]))
    for more in ({"kind": "mean"}, {"kind": "resample", "reference": other}, {"kind": "mean", "positions": "all"}):
        whole = ma.ablation(model, task, sites=("encoder_z", "cross_z"), **more, progress=False)
        cut = ma.ablation(
            model, task, sites=("encoder_z", "cross_z"), **more, progress=False, executor=InProcess(pairs=2)
        )
        for name, table in whole.tensors.items():
            # another shape of batch rounds differently, and RMS norms of transformers work in float32
            torch.testing.assert_close(cut.tensors[name].values, table.values, rtol=0, atol=1e-5)
    uneven = ma.tasks.from_pairs(model, UNEVEN)
    with pytest.raises(
        AlignmentError, match=r"the prompt has 4 tokens in pair 0 and 5 in the one it takes values from"
    ):
        ma.ablation(model, uneven, kind="resample", sites="encoder_z", positions="all")
    with pytest.raises(AlignmentError, match=r"in its reference\n  found: prompts of 5 tokens, not 4"):
        ma.ablation(model, task, reference=ma.tasks.from_pairs(model, UNEVEN[1:]), sites="encoder_z")
    with pytest.raises(UnsupportedFeatureError, match="zero ablation of cross_attn_scores\n  found: padding would be"):
        ma.ablation(model, task, kind="zero", sites="cross_attn_scores")
    for short in ("encoder_pattern", "cross_pattern"):
        with pytest.raises(UnsupportedFeatureError, match=f"mean ablation of {short}"):
            ma.ablation(model, task, sites=short)


def test_blocks_of_pairs_with_a_source_give_what_one_call_gives():
    model = families.hooked("t5", torch.float64)
    task = ma.tasks.from_pairs(model, [*ANSWERED, ANSWERED[0]])
    for method in (ma.activation_patching, ma.attribution_patching):
        more = {"sites": ("encoder_z", "cross_z"), "progress": False}
        whole, cut = method(model, task, **more), method(model, task, **more, executor=InProcess(pairs=2, nodes=9))
        assert cut.provenance == whole.provenance
        for name, table in whole.tensors.items():
            # another shape of batch rounds differently, and RMS norms of transformers work in float32
            torch.testing.assert_close(cut.tensors[name].values, table.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("variant", ["atp", "hedged"])
def test_attribution_ranks_heads_of_cross_attention(family, variant):
    model = families.hooked(family, torch.float64)
    task = ma.tasks.from_pairs(model, ANSWERED)
    exact = ma.activation_patching(model, task, sites="cross_z", progress=False).scores["cross_z"].values.flatten()
    found = ma.attribution_patching(model, task, sites="cross_z", variant=variant, progress=False)
    ranks = torch.stack([exact, found.scores["cross_z"].values.flatten()])
    assert torch.corrcoef(ranks)[0, 1] > 0.6  # an estimate; a random order would be near 0
    left_out = {
        "t5": "not defined for encoder-decoder models",
        "bart": "undefined where norms act on the residual stream",
    }
    assert found.settings["graddrop"] == (left_out[family] if variant == "hedged" else None)


def test_a_task_is_told_by_its_sources():
    model = families.hooked("t5")
    one, other = (ma.tasks.from_pairs(model, [pair]) for pair in ANSWERED)
    assert one.clean.tokens.tolist() == other.clean.tokens.tolist() == [[3]]
    assert one.hash() != other.hash()
    found = ma.activation_patching(model, one, sites="cross_z", progress=False)
    assert found.settings["n_identical_pairs"] == 0
    assert [text for text, differs in one.sample()[0] if differs] == ["17"]


def test_what_does_not_know_cross_attention_is_refused():
    model = families.hooked("t5")
    task = ma.tasks.from_pairs(model, ANSWERED)
    for method in (ma.edge_attribution, ma.causal_tracing, ma.edge_patching):
        with pytest.raises(UnsupportedFeatureError, match="an encoder-decoder model, whose cross-attention reads and"):
            method(model, task)
    with pytest.raises(UnsupportedFeatureError, match=r"to estimate ablation\n.*\n  fix: call the method on a few"):
        ma.estimate(model, task, "ablation")  # the way out is not to take another method
    with pytest.raises(UnsupportedFeatureError, match=r"variant='star'\n  found: an encoder-decoder model"):
        ma.attribution_patching(model, task, variant="star")
    spans = [{**pair, "spans": {"name": (1, 2)}} for pair in ANSWERED]
    with pytest.raises(UnsupportedFeatureError, match="named spans in task 'pairs'"):
        ma.tasks.from_pairs(model, spans)
