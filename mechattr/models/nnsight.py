"""The nnsight backend: the same runs as traces of an nnsight model, in this process or on an NDIF server.

nnsight is imported when the first model is made, because importing it changes `torch.Tensor.backward` everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.errors import NonFiniteError, SelfCheckError, SettingError, UnsupportedFeatureError
from mechattr.models import nnsight_remote as remotely
from mechattr.models.base import AttentionForm, Batch, Generation, Metric, Run, Start, Visit
from mechattr.models.checks import check_block
from mechattr.models.edits import Edit, Frame
from mechattr.models.families import Family
from mechattr.models.greedy import continue_greedily
from mechattr.models.nnsight_body import body
from mechattr.models.nnsight_model import Traced
from mechattr.models.nnsight_plan import plan_of
from mechattr.models.nnsight_replay import Replay
from mechattr.models.rules import Rules
from mechattr.models.run_checks import check_asked, check_finite, check_fired, check_metric, no_gradient
from mechattr.models.running import Turns
from mechattr.models.selfcheck import selfcheck
from mechattr.models.tape import Tape, plan
from mechattr.models.taps import Taps, plan_edits
from mechattr.models.vision import positions_of
from mechattr.sites import expand, parse, site_spec


class HookedNNsight(Traced):
    """A transformers model behind the `HookedModel` protocol, run by nnsight.

    Every run is one trace. With `remote="local"` it is serialised, this package and other local modules are hidden, and
    what comes out is run here: the offline test of `remote=True`, which sends it to an NDIF server.

    Args:
        model: a transformers model, or an `nnsight.LanguageModel` or `TransformersModel`.
        tokenizer: its tokenizer; by default that of the nnsight model.
        name: what results call the model.
        revision: the revision it was loaded at, if known.
        remote: `False`, `"local"` or `True`.
        family: where its sites are; by default its row of the table, or what `discover` finds.

    Raises:
        BackendError: nnsight is not installed, or no NDIF key with `remote=True`.
        UnsupportedModelError: a family that cannot be described, or a model that a server cannot find.
        SelfCheckError: a site that does not do what its name says.
        ModelStateError: a model in training mode.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        remote: bool | str = False,
        family: Family | None = None,
    ) -> None:
        super().__init__(model, tokenizer, name=name, revision=revision, remote=remote, family=family)
        self._turns = Turns()
        self._forms: dict[int, AttentionForm] = {}
        if remote is not True:  # a server is not asked before there is a question
            selfcheck(self)

    def attention(self, layer: int) -> AttentionForm:
        """How a block's attention turns q.k into scores, as seen in a run of one token.

        Raises:
            SettingError: no such block.
        """
        check_block(self.info, layer)
        if not self._forms:
            one = Batch.of(torch.zeros(1, 1, dtype=torch.long, device=self.device))
            forms = self._trace(one, _taps(one, record=expand("rot_q", self._sites)))["forms"]
            for index, form in forms.items():
                scaling = form["d_head"] ** -0.5 if form["scaling"] is None else float(form["scaling"])
                sinks = None if form["s_aux"] is None else form["s_aux"].detach().flatten()
                self._forms[index] = AttentionForm(scaling, form["softcap"], sinks)
        return self._forms[layer]

    def run(
        self,
        batch: Batch,
        *,
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        metric: Metric | None = None,
        gradients: str | Sequence[str] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        visit: Visit | None = None,
        checkpoint: bool = False,
    ) -> Run:
        """One trace: a forward pass and, if gradients are asked for, one backward pass. See `HookedModel.run`.

        A function that is given as metric or edit runs inside the trace. A metric gets rows with the tokens, mask,
        example, strings, lengths, positions and columns of a batch. With
        `visit`, gradients are collected first.

        Raises:
            UnsupportedFeatureError: rules other than `hold`, a site inside a fused attention, a function that cannot be
                sent.
            BackendError: a server that fails or cannot be reached.
        """
        self._check_checkpoint(checkpoint)
        check_asked(expand(gradients, self._sites), metric, visit)
        arguments = {
            "record": record,
            "edits": self._edited(batch, edits),
            "metric": metric,
            "rules": rules,
            "start": start,
        }
        tape = self._tape(batch, gradients=gradients, visited=visit is not None, **arguments)
        found: dict[str, Tensor] = {}
        if visit is not None:
            tape.pull_back(visit, last=True)
        else:
            found = tape.gradients()
        return Run(tape.logits, Cache.from_tensors(tape.activations), Cache.from_tensors(found), tape.metric)

    def tape(
        self,
        batch: Batch,
        *,
        metric: Metric | None = None,
        gradients: str | Sequence[str],
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        checkpoint: bool = False,
    ) -> Tape:
        """One trace with its gradients, handed over later; a pass from gradients at sites is a trace of its own. The
        trace differentiates a metric, which is therefore needed."""
        self._check_checkpoint(checkpoint)
        arguments = {
            "record": record,
            "edits": self._edited(batch, edits),
            "metric": metric,
            "rules": rules,
            "start": start,
        }
        return self._tape(batch, gradients=gradients, visited=True, **arguments)

    def run_reduced(
        self,
        batch: Batch,
        reduce: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Any],
        *,
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        metric: Metric | None = None,
        gradients: str | Sequence[str] = (),
        rules: Rules | None = None,
        start: Start | None = None,
    ) -> Any:
        """What `reduce(activations, gradients)` makes of a run, worked out inside the trace: scores travel, not
        activations.

        Args:
            batch: token rows.
            reduce: gets activations and gradients by full site name (without the sites that the metric does not depend
                on) and returns tensors, or plain values of them. It is sent as source, with what it refers to.
            record: sites that `reduce` gets activations of.
            edits: as in `run`.
            metric: as in `run`.
            gradients: sites that `reduce` gets gradients of.
            rules: as in `run`.
            start: as in `run`.

        Raises:
            NonFiniteError: NaN or infinity in the logits.
            SettingError, UnsupportedFeatureError, BackendError: as in `run`.
        """
        taps = self._planned(batch, record, self._edited(batch, edits), metric, gradients, rules, start)
        found = self._trace(batch, taps, metric=metric, reduce=reduce)
        if metric is not None:
            check_metric(found["metric"], batch)
        if not found["finite"]:
            raise NonFiniteError(
                "a forward pass", "NaN or infinity in the logits", "run it without reduce to see where"
            )
        return found["reduced"]

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """Greedy continuation under edits, one trace a token, each over all tokens so far.

        Positions of edits are absolute, as in the reference backend.

        Args:
            batch: prompts, padded on the left if at all.
            edits: active in every forward pass.
            **kwargs: `max_new_tokens` (20), `eos_token_id` (the model's own) and `do_sample=False`.

        Raises:
            SettingError: other settings, a right-padded batch, or more tokens than the model has positions.

        Cost:
            `max_new_tokens` forward passes without a cache of keys and values.
        """
        self._check(batch)
        configured = getattr(self.model, "generation_config", None)
        ends = kwargs.pop("eos_token_id", getattr(configured, "eos_token_id", None))
        planned = plan_edits(self._edited(batch, edits, grows=True), self._sites, self.info, batch.lengths)

        def forward(grown: Batch) -> Tensor:
            self._check(grown)
            taps = _taps(grown, edits=planned)
            taps.frame = Frame(batch.lengths, grown.positions, grown.positions)
            return self._forward(grown, taps)

        pad = next((i for i in (getattr(self.tokenizer, "pad_token_id", None), self.config.pad_token_id) if i), 0)
        tokens = continue_greedily(forward, batch, "nnsight", kwargs, ends=ends, pad=pad)
        new = tokens[:, batch.tokens.shape[1] :]
        texts = () if self.tokenizer is None else tuple(self.tokenizer.batch_decode(new, skip_special_tokens=True))
        return Generation(tokens, batch.tokens.shape[1], texts)

    def _tape(self, batch: Batch, *, visited: bool, gradients: str | Sequence[str], **arguments: Any) -> Replay:
        taps = self._planned(batch, gradients=gradients, **arguments)
        metric = arguments["metric"]
        found = self._trace(batch, taps, metric=metric, visited=visited)
        logits, value = found["logits"], found["metric"]
        check_finite(logits, batch, partial(self._everything, batch, taps), self._sites)
        if metric is not None:
            check_metric(value, batch)
        if taps.gradients and found["tracked"] and not found["differentiable"]:
            raise no_gradient()
        inner = {name: found["gradients"].get(name) for name in self._sites if name in taps.gradients}
        return Replay(found, inner, partial(self._trace, batch, taps))

    def _planned(
        self,
        batch: Batch,
        record: str | Sequence[str],
        edits: Sequence[Edit],
        metric: Metric | None,
        gradients: str | Sequence[str],
        rules: Rules | None,
        start: Start | None,
    ) -> Taps:
        self._check(batch)
        check_asked(expand(gradients, self._sites), metric)
        sites = [edit.site for edit in edits if isinstance(edit, Edit)] if isinstance(edits, Sequence) else []
        self._check_inside([record, gradients, *sites])
        if isinstance(rules, Rules) and not self.supports(rules):
            raise UnsupportedFeatureError(
                f"rules {rules.to_json()} on the nnsight backend", "of rules it has only hold", "use backend='hf'"
            )
        taps = plan(self.info, self._sites, batch, record, edits, metric, gradients, rules, start)
        taps.fired |= {name for name in self._sites if start is None or _above(name, start)}
        check_fired(taps)
        return taps

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        found = self._trace(batch, taps)
        taps.activations.update(found["activations"])
        logits: Tensor = found["logits"]
        return logits

    def _everything(self, batch: Batch, taps: Taps) -> Mapping[str, Tensor]:
        probe = _taps(batch, edits=taps.edits, record=self._sites, start=taps.start)
        activations: Mapping[str, Tensor] = self._trace(batch, probe)["activations"]
        return activations

    def _trace(self, batch: Batch, taps: Taps, **more: Any) -> dict[str, Any]:
        steps = plan_of(self.model, self._anatomy, self.info, batch, taps, **more)
        inputs = {
            "input_ids": batch.tokens,
            "attention_mask": batch.mask.long() if batch.padded else None,
            "position_ids": positions_of(self.model, batch, self._anatomy.family.position_offset),
            **({} if self.info.encoder else {"use_cache": False}),
        }
        with self._turns(), torch.enable_grad() if taps.gradients else torch.no_grad():
            found = remotely.trace(self.traced, body, steps, inputs, self.remote)
        if "lost" in found:
            what, names = found["lost"]
            raise SelfCheckError(what, f"the source of it has {', '.join(names)}", "use backend='hf'")
        if "misfit" in found:
            site, got, gave = found["misfit"]
            raise SettingError(
                f"an edit of {site}",
                f"its operator got {got} and returned {gave}",
                "return a tensor of the same shape, dtype and device",
            )
        return found


def _taps(batch: Batch, **wanted: Any) -> Taps:
    wanted["record"] = frozenset(wanted.get("record", ()))
    taps = Taps(Frame.whole(batch), **wanted)
    taps.axes = {name: site_spec(name).axes for name in taps.names}
    return taps


def _above(name: str, start: Start) -> bool:
    """Whether a run from the middle passes a site."""
    layer = parse(name)[1]
    return layer >= start.layer if layer is not None else "embed" not in name
