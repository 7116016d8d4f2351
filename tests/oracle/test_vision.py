"""Images in a batch: their tokens are positions like others, and every number is the model's own."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
import vision_cases as cases
from test_models_gradients import TOLERANCE, disagreements

import mechattr as ma
from mechattr.models import Add, Batch, Edit, HookedHF, Scale, Set, Start, vision
from mechattr.models.images import joined
from mechattr.sites import parse

every_family = pytest.mark.parametrize("family", cases.FAMILIES)
with_others = pytest.mark.parametrize("family", [*cases.FAMILIES, *cases.OTHERS])


def own_logits(model: HookedHF, family: str, batch: Batch) -> torch.Tensor:
    """The logits of transformers' own call; LLaVA would count padding among its positions."""
    positions = {"position_ids": batch.positions.clamp(min=0)} if "qwen" not in family else {}
    with torch.no_grad(), vision.unchanged(model.model):
        return model.model(input_ids=batch.tokens, **cases.native(family, batch), **positions).logits


@with_others
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_model_bit_for_bit_with_and_without_taps(family, attention, dtype):
    model = families.hooked(family, dtype, attention)
    sites = [name for name in model.sites() if parse(name)[0] not in ("attn_scores", "pattern", "result")]
    for side in ("left", "right"):
        batch = cases.shown(family, side, dtype=dtype)
        own = own_logits(model, family, batch)
        assert torch.equal(model.run(batch).logits, own)
        assert torch.equal(model.run(batch, record=sites).logits, own)


@with_others
def test_rows_without_a_picture_run_alone_as_the_text_that_they_are(family):
    model, batch = families.hooked(family, torch.float64), cases.shown(family, dtype=torch.float64)
    some = batch.rows([2, 2])
    text = Batch.of(some.tokens, some.mask)
    assert torch.equal(model.run(some).logits, model.run(text).logits)
    settings = {"max_new_tokens": 2, "do_sample": False}
    left = cases.shown(family, "left", dtype=torch.float64).rows([2])
    tokens = model.generate(left, **settings).tokens
    assert torch.equal(tokens, model.generate(Batch.of(left.tokens, left.mask), **settings).tokens)
    with_picture = model.run(batch).logits  # the control: rows are not swallowed where others have a picture
    assert not torch.equal(with_picture[1, : some.tokens.shape[1]], model.run(some).logits[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_control_positions_of_text_are_wrong_for_tokens_of_an_image(family, monkeypatch):
    model, batch = families.hooked(family), cases.shown(family)
    monkeypatch.setattr(vision, "positions_of", lambda _model, batch, *_: batch.positions.clamp(min=0))
    assert (model.run(batch).logits - own_logits(model, family, batch)).abs().max() > 0.1


@every_family
def test_the_tower_keeps_its_attention_while_the_language_models_is_tapped(family):
    model, batch = families.hooked(family, attention="sdpa"), cases.shown(family)
    seen: list[str] = []
    tower = next(m for n, m in model.model.named_modules() if n.endswith(("self_attn", "attn")) and "language" not in n)
    handle = tower.register_forward_hook(lambda m, *_: seen.append(m.config._attn_implementation))
    try:
        run = model.run(batch, record=("embed", "pattern"))
    finally:
        handle.remove()
    assert seen == ["sdpa"]
    with torch.no_grad():
        wanted = model.model.get_image_features(**joined(batch.images), return_dict=True).pooler_output
    assert torch.equal(run.activations["embed"].values[batch.image], torch.cat(list(wanted)))


@with_others
def test_finite_differences_agree_with_the_gradient_at_every_site(family):
    first = cases.rows_of(family)[0]
    with families.widened():
        batch = cases.shown(family, rows=(first, (5, *first[:-1])), dtype=torch.float64)
        found = disagreements(families.hooked(family, torch.float64), batch)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def slope_at_the_image(model: HookedHF, family: str) -> tuple[float, float]:
    """The slope of a metric along a change of what the language model receives at image tokens, claimed by the gradient
    at `embed`, and measured on transformers' own model from embeddings that are merged here, without any hook."""
    batch = cases.shown(family, rows=cases.ROWS[:1], dtype=torch.float64)
    gradient = model.run(batch, metric=families.probe, gradients="embed").gradients["embed"].values
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    direction = noise * batch.image[..., None]
    inner, step = model.model, 1e-4
    with torch.no_grad(), vision.unchanged(inner):
        features = inner.get_image_features(**joined(batch.images), return_dict=True).pooler_output
        merged = inner.get_input_embeddings()(batch.tokens)
        merged[batch.image] = torch.cat(list(features))
        if family == "llava":
            positions = batch.positions
        else:
            given = {"image_grid_thw": joined(batch.images)["image_grid_thw"], "mm_token_type_ids": batch.image.int()}
            positions = inner.model.get_rope_index(batch.tokens, **given)[0]
        up, down = (
            families.probe(inner(inputs_embeds=merged + sign * step * direction, position_ids=positions).logits, batch)
            for sign in (1, -1)
        )
    return float((gradient * direction).sum()), float((up - down) / (2 * step))


@every_family
def test_embed_is_what_the_language_model_receives(family):
    with families.widened():
        claimed, measured = slope_at_the_image(families.hooked(family, torch.float64), family)
    assert claimed == pytest.approx(measured, rel=1e-5)  # a central difference of step 1e-4 in float64
    assert abs(measured) > 0.1


@every_family
def test_control_the_token_embedding_before_the_merge_is_not_it(family):
    with families.widened():
        model = HookedHF(families.model(family, torch.float64))
        model._anatomy = replace(model._anatomy, family=replace(model._anatomy.family, language=None))
        claimed, measured = slope_at_the_image(model, family)
    assert claimed == 0  # image features overwrite it
    assert abs(measured) > 0.1


@every_family
def test_another_images_embeddings_are_that_image(family):
    model = families.hooked(family)
    one, other = cases.shown(family, rows=cases.ROWS[:1]), cases.shown(family, rows=cases.ROWS[:1], seed=9)
    (first, last), wanted = one.image_spans[0][0], model.run(other, record="embed")
    edit = Edit("embed", Set(wanted.activations["embed"].values[:, first:last]), positions=range(first, last))
    assert torch.equal(model.run(one, edits=[edit]).logits, wanted.logits)
    assert not torch.equal(model.run(one).logits, wanted.logits)


@with_others
def test_a_padded_batch_gives_what_its_rows_give_alone(family):
    model, sites = families.hooked(family, torch.float64), ("embed", "z", "pattern", "resid_post")
    for side in ("left", "right"):
        batch = cases.shown(family, side, dtype=torch.float64)  # the last row is a text without an image
        together = model.run(batch, record=sites, metric=families.probe, gradients=sites)
        for row in range(len(batch)):
            real = batch.mask[row]
            single = model.run(cases.alone(batch, row), record=sites, metric=families.probe, gradients=sites)
            # softmaxes and RMS norms of transformers work in float32 whatever the model's dtype, hence 1e-5
            close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(together.logits[row, real], single.logits[0], **close)
            for name, x in single.gradients.items():
                whole = [r.values[row] for r in (together.activations[name], together.gradients[name])]
                whole = [w[:, real][:, :, real] if "query" in x.axes else w[real] for w in whole]
                torch.testing.assert_close(whole[0], single.activations[name].values[0], **close)
                size = max(1.0, float(x.values.abs().max()))
                torch.testing.assert_close(whole[1] / size, x.values[0] / size, **close)


@every_family
def test_a_run_from_the_middle_needs_no_tower(family, monkeypatch):
    model, batch = families.hooked(family), cases.shown(family, "left")
    whole = model.run(batch, record="resid_pre")
    start = Start(1, whole.activations["resid_pre", 1].values)
    monkeypatch.setattr(vision, "_features", None)
    assert torch.equal(model.run(batch, start=start).logits, whole.logits)


def test_images_of_other_sizes_stand_in_one_batch():
    model, tokens = families.hooked("mistral3"), torch.tensor([[7, 4, 4, 4, 4, 8], [7, 8, 9, 4, 4, 8]])
    small = {"pixel_values": torch.randn(1, 3, 4, 8), "image_sizes": torch.tensor([[4, 8]])}
    batch = Batch.of(tokens, images=[cases.picture("mistral3"), small], image=tokens == 4)
    together = model.run(batch).logits
    for row in range(2):
        # the tower's float32 sums have another length
        torch.testing.assert_close(together[row], model.run(cases.alone(batch, row)).logits[0], rtol=0, atol=1e-4)


@with_others
def test_the_tower_runs_once_for_each_image_and_leaves_nothing_behind(family, monkeypatch):
    model = families.hooked(family)
    batch, tower, seen = cases.shown(family), type(model.model.base_model).get_image_features, []

    def counted(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return tower(self, pixel_values, *args, **kwargs)

    counted.__signature__ = inspect.signature(tower)
    before = dict(model.model.base_model.__dict__)
    plain = model.run(batch).logits
    monkeypatch.setattr(type(model.model.base_model), "get_image_features", counted)
    many = model.run(batch.rows([0, 1, 0, 2, 0, 1]))
    assert seen == [sum(len(row["pixel_values"]) for row in batch.images if row)]
    torch.testing.assert_close(many.logits[[4, 5, 3]], plain, rtol=0, atol=1e-5)  # sums of other batch sizes
    model.generate(cases.shown(family, "left"), max_new_tokens=2)
    assert model.model.base_model.__dict__ == before


# an image token that is generated is read as text with a cache, and has no image without one
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [4]}


def tokens_of(model: HookedHF, batch: Batch, *edits: Edit, **settings: Any) -> torch.Tensor:
    return model.generate(batch, edits=edits, **GREEDY, **settings).tokens


@every_family
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_transformers_own(family, beams):
    model, batch = families.hooked(family), cases.shown(family, "left", rows=cases.rows_of(family)[:2])
    with vision.unchanged(model.model):
        own = model.model.generate(
            batch.tokens, **cases.native(family, batch), **GREEDY, pad_token_id=2, num_beams=beams
        )
    assert torch.equal(tokens_of(model, batch, num_beams=beams), own)
    nothing = [Edit(site, Scale(1.0)) for site in ("embed", "resid_post", "z", "v", "pattern")]
    assert torch.equal(tokens_of(model, batch, *nothing, num_beams=beams), own)
    if beams == 1:
        other = tokens_of(model, cases.shown(family, "left", rows=cases.rows_of(family)[:2], seed=9))
        assert not torch.equal(other, own)


@with_others
def test_generation_under_edits_needs_no_cache_and_no_neighbours(family):
    model, batch = families.hooked(family), cases.shown(family, "left")
    strong = Add(4 * torch.randn(24, generator=torch.Generator().manual_seed(1)))
    edit = Edit("resid_post", strong, positions=[2, -1, 10], layers=[0])  # an image token or text, and what follows
    found = tokens_of(model, batch, edit)
    assert torch.equal(found, tokens_of(model, batch, edit, use_cache=False))
    assert not torch.equal(found, tokens_of(model, batch))
    for row in range(len(batch)):
        single = cases.alone(batch, row)
        assert torch.equal(
            found[row, batch.tokens.shape[1] :], tokens_of(model, single, edit)[0, single.tokens.shape[1] :]
        )


def task_of(model: HookedHF, family: str) -> ma.tasks.Task:
    """Pairs of one text each, whose clean and corrupt prompt show different pictures."""
    ids = list(cases.ROWS[0])
    pairs = [
        {
            "clean_tokens": ids,
            "corrupt_tokens": ids,
            "clean_image": cases.picture(family, i, torch.float64),
            "corrupt_image": cases.picture(family, 9 + i, torch.float64),
            "answer": 20 + i,
            "foil": 30 + i,
        }
        for i in range(3)
    ]
    return ma.tasks.from_pairs(model, pairs)


@every_family
def test_patching_and_its_estimate_over_image_tokens_are_their_definitions(family):
    model = families.hooked(family, torch.float64)
    task = task_of(model, family)
    assert [spans["image"] for spans in task.spans] == [(2, 6)] * 3
    settings: dict[str, Any] = {"sites": ["resid_pre"], "positions": "aligned"}
    exact = ma.activation_patching(model, task, **settings)
    estimate = ma.attribution_patching(model, task, **settings, variant="atp")
    base = model.run(task.clean, record="resid_pre", metric=task.metric, gradients="resid_pre")
    source = model.run(task.corrupt, record="resid_pre").activations
    for layer in range(2):
        there = source["resid_pre", layer].values
        change = there - base.activations["resid_pre", layer].values
        linear = (change * base.gradients["resid_pre", layer].values).sum(-1).mean(0)
        for position in range(9):
            edit = Edit("resid_pre", Set(there[:, [position]]), layers=[layer], positions=[position])
            effect = (model.run(task.clean, edits=[edit], metric=task.metric).metric - base.metric).mean()
            node = ma.Node(site="resid_pre", layer=layer, pos=position)
            # runs of other batch sizes, norms in float32
            assert exact.value(node, "signed") == pytest.approx(float(effect), rel=1e-4, abs=1e-5)
            assert estimate.value(node, "signed") == pytest.approx(float(linear[position]), rel=1e-4, abs=1e-5)
            if layer == 0 and position not in range(2, 6):
                assert exact.value(node, "signed") == 0  # the texts are the same
    at_image = [exact.value(ma.Node(site="resid_pre", layer=0, pos=p), "score") for p in range(2, 6)]
    assert min(at_image) > 1e-3
    assert exact.settings["n_identical_pairs"] == 0


@every_family
def test_gradient_times_input_sums_to_the_change_between_close_images(family):
    """A path of one small step: the effect of all image tokens is the sum of theirs, to first order."""
    model = families.hooked(family, torch.float64)
    batch = cases.shown(family, rows=cases.ROWS[:1], dtype=torch.float64)

    def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits[range(len(batch)), batch.columns(-1), 20]

    run = model.run(batch, record="embed", metric=metric, gradients="embed")
    step = 1e-4 * run.activations["embed"].values * batch.image[..., None]
    scores = (run.gradients["embed"].values * run.activations["embed"].values).sum(-1)
    with families.widened():
        ends = [model.run(batch, edits=[Edit("embed", Add(s * step))], metric=metric).metric for s in (1, -1)]
    measured = float((ends[0] - ends[1]) / 2e-4)
    assert float(scores[batch.image].sum()) == pytest.approx(measured, rel=1e-3)  # gradients with norms in float32
