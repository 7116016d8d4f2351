"""What every supported family promises: the model's own numbers, whatever is tapped, padded or restarted."""

from __future__ import annotations

import families
import pytest
import torch

from mechattr.errors import UnknownSiteError, UnsupportedFeatureError
from mechattr.models import Add, Batch, Edit, Set, Start
from mechattr.sites import parse

every_family = pytest.mark.parametrize("family", families.EVERY)
SUMMED = ("result", "expert_out")  # taking these apart sums heads or experts in another order
every_attention = pytest.mark.parametrize(("family", "attention"), families.ATTENTIONS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def largest(x: torch.Tensor) -> float:
    return max(1.0, float(x.abs().max()))


def same(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    """Equal up to `relative` of the largest entry."""
    seen = wanted.where(wanted > -1e30, 0)  # masked scores are the most negative number of the dtype
    torch.testing.assert_close(found.where(wanted > -1e30, 0), seen, rtol=0, atol=relative * largest(seen))


@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_taps_logits_are_those_of_the_model_bit_for_bit(family, dtype):
    check_bits(family, families.hooked(family, dtype))


@every_attention
def test_the_same_holds_for_the_attention_that_a_model_was_loaded_with(family, attention):
    check_bits(family, families.hooked(family, attention=attention))


def check_bits(family, model):
    dtype = model.model.dtype
    whole = families.batch_of(family, families.tokens())
    assert torch.equal(model.run(whole).logits, families.own_logits(model, whole))
    by_column = model._anatomy.family.by_column  # such models have no argument that says what left padding is
    for side in ("right",) if by_column else ("left", "right"):
        batch = families.ragged_of(family, side)
        own = families.own_logits(model, batch)
        if own.isnan().any():  # transformers' float32 softmax overflows on rows that are padding only
            assert dtype == torch.float64
            assert model.run(batch).logits.isfinite().all()
        else:
            assert torch.equal(model.run(batch).logits, own)


@every_attention
def test_taps_outside_scores_and_pattern_keep_every_bit(family, attention):
    model, batch = families.hooked(family, attention=attention), families.batch_of(family, families.tokens())
    sites = [name for name in model.sites() if not name.endswith(("attn_scores", "pattern", *SUMMED))]
    run = model.run(batch, record=sites)
    assert set(run.activations) == set(sites)
    assert torch.equal(run.logits, model.run(batch).logits)


@every_family
def test_with_all_taps_logits_stay_within_1e_5(family):
    model, batch = families.hooked(family), families.ragged_of(family, "left")
    run = model.run(batch, record=model.sites(), metric=families.probe, gradients=model.sites())
    same(run.logits[batch.mask], model.run(batch).logits[batch.mask], 1e-5)  # sums over heads and experts


@every_family
def test_a_padded_batch_gives_what_its_rows_give_alone(family):
    model, sites = families.hooked(family, torch.float64), families.hooked(family).sites()
    sides = {side: families.ragged_of(family, side) for side in ("left", "right")}
    rows = [families.alone(sides["left"], row) for row in range(3)]
    singles = [model.run(row, record=sites, metric=families.probe, gradients=sites) for row in rows]
    for batch in sides.values():
        together = model.run(batch, record=sites, metric=families.probe, gradients=sites)
        for row, alone in enumerate(singles):
            real = batch.mask[row]
            # softmaxes and RMS norms of transformers work in float32 whatever the model's dtype, hence 1e-5
            same(together.logits[row, real], alone.logits[0], 1e-5)
            same(together.metric[row], alone.metric[0], 1e-5)
            for name in sites:
                for whole, single in ((together.activations, alone.activations), (together.gradients, alone.gradients)):
                    same(families.real(whole[name], batch, row), single[name].values[0], 1e-5)


@every_family
def test_a_padded_batch_gives_the_logits_of_its_rows_in_float32(family):
    model = families.hooked(family)
    for side in ("left", "right"):
        batch = families.ragged_of(family, side)
        together = model.run(batch).logits
        for row in range(3):
            alone = model.run(families.alone(batch, row)).logits[0]
            same(together[row, batch.mask[row]], alone, 1e-5)  # float32 sums


def test_control_the_default_position_ids_of_a_left_padded_batch_are_wrong():
    model, batch = families.hooked("gpt2"), families.ragged("left")
    with torch.no_grad():
        default = model.model(batch.tokens, attention_mask=batch.mask.long()).logits
    alone = model.run(Batch.of(batch.tokens[1, batch.mask[1]])).logits[0]
    with pytest.raises(AssertionError):
        same(default[1, batch.mask[1]], alone, 1e-5)


@every_family
def test_an_edit_that_changes_nothing_changes_no_bit(family):
    model, batch = families.hooked(family), families.ragged_of(family, "right")
    shorts = dict.fromkeys(parse(name)[0] for name in model.sites())
    inside = [short for short in shorts if short.endswith(("attn_scores", "pattern"))]
    outside = [short for short in shorts if short not in inside and not short.endswith(SUMMED)]
    usual, explicit = model.run(batch, record=outside), model.run(batch, record=inside)
    for short in shorts:
        plain = (explicit if short in inside else usual).logits  # the same attention path
        recorded = explicit if short in inside else usual if short in outside else model.run(batch, record=[short])
        itself = recorded.activations
        for op, positions in ((lambda x, place: x, None), (Set(itself), None), (Set(itself), [0])):
            edited = model.run(batch, edits=[Edit(short, op, positions=positions)]).logits
            if short.endswith(SUMMED):
                same(edited[batch.mask], plain[batch.mask], 1e-5)  # the sum over heads is taken in another order
            else:
                assert torch.equal(edited, plain), short


@every_family
def test_patching_every_position_at_the_embedding_gives_the_other_run(family):
    model = families.hooked(family)
    clean, corrupt = (families.batch_of(family, families.tokens(seed=seed)) for seed in (1, 2))
    embeds = [name for name in ("embed", "encoder_embed") if model.supports(name)]
    other = model.run(corrupt, record=embeds)
    edits = [Edit(name, Set(other.activations)) for name in embeds]
    assert torch.equal(model.run(clean, edits=edits).logits, other.logits)
    assert not torch.equal(model.run(clean).logits, other.logits)


@every_family
def test_a_run_from_a_cached_residual_equals_the_whole_run(family):
    model, batch = families.hooked(family), families.ragged_of(family, "left")
    edit = Edit("z", Add(0.5), layers=[1], heads=[1], positions=[-1])
    inside = families.inside_mlp(model)
    whole = model.run(batch, edits=[edit], record=("resid_pre", "mlp_out"), metric=families.probe, gradients=inside)
    for layer in range(model.info.n_layers):
        start = Start(layer, whole.activations["resid_pre", layer].values)
        sites = [n for n in model.sites() if parse(n)[0] == "mlp_out" and parse(n)[1] >= layer]
        nodes = [n for n in model.sites() if parse(n)[0] == inside and parse(n)[1] >= layer]
        part = model.run(batch, edits=[edit], record=sites, metric=families.probe, gradients=nodes, start=start)
        assert torch.equal(part.logits, whole.logits)
        assert all(torch.equal(part.activations[n].values, whole.activations[n].values) for n in sites)
        assert all(torch.equal(part.gradients[n].values, whole.gradients[n].values) for n in nodes)
    start = Start(1, whole.activations["resid_pre", 1].values)
    for name in ("blocks.0.attn.hook_z", "hook_embed"):
        with pytest.raises(UnsupportedFeatureError, match=r"(?s)site .* did not fire .* the run starts at block 1"):
            model.run(batch, record=name, start=start)


@every_family
def test_resid_post_is_resid_mid_plus_mlp_out_after_an_edit_of_resid_mid(family):
    model, batch = families.hooked(family, torch.float64), families.batch_of(family, families.tokens())
    if "blocks.0.hook_resid_mid" not in model.sites():
        assert model.info.parallel or model.info.post_norm
        with pytest.raises(UnknownSiteError, match="this model has no such site"):
            model.run(batch, record="resid_mid")
        return
    noise = torch.randn(3, 7, 24, dtype=torch.float64)
    middles = [short for short in ("resid_mid", "resid_mid_cross") if model.supports(short)]
    run = model.run(batch, record=(*middles, "mlp_out", "resid_post"), edits=[Edit(middles[-1], Add(noise))])
    plain = model.run(batch, record=middles)
    moved = run.activations[middles[-1], 0].values - plain.activations[middles[-1], 0].values
    torch.testing.assert_close(moved, noise, rtol=0, atol=1e-12)  # sums in float64
    for layer in range(2):
        mid, out, post = (run.activations[short, layer].values for short in (middles[-1], "mlp_out", "resid_post"))
        torch.testing.assert_close(post, mid + out, rtol=0, atol=1e-12)  # sums in float64


def test_control_an_alias_of_the_mlp_norms_input_leaves_the_skip_path_behind():
    model, batch = families.hooked("gpt2", torch.float64), Batch.of(families.tokens())
    noise = torch.randn(3, 7, 24, dtype=torch.float64)
    handle = model.model.transformer.h[0].ln_2.register_forward_pre_hook(lambda m, args: (args[0] + noise,))
    try:
        run = model.run(batch, record=("resid_mid", "mlp_out", "resid_post"))
    finally:
        handle.remove()
    mid, out, post = (run.activations[short, 0].values for short in ("resid_mid", "mlp_out", "resid_post"))
    assert (post - (mid + noise + out)).abs().max() > 0.1
