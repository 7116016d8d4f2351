"""What a run and its backward passes must satisfy: checked while they go by, where `checks` looks before they begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mechattr.errors import (
    ModelStateError,
    NonFiniteError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import Batch, Metric, Visit
from mechattr.models.taps import Taps
from mechattr.sites import parse, position_axis, reads_source, site_spec


def check_asked(gradients: Sequence[str], metric: Metric | None, visit: Visit | None = None) -> None:
    """Whether a run that is to give gradients has a metric, and one that is watched has gradients."""
    if gradients and metric is None:
        raise SettingError("gradients", "no metric to differentiate", "pass metric=task.metric or a function")
    if visit is not None and not gradients:
        raise SettingError("visit", "no site whose gradient is asked for", "name sites with gradients=")
    check_differentiable(bool(gradients))


def check_differentiable(asked: bool) -> None:
    """Whether gradients can be had where they are asked for: in inference mode all of them would be zero."""
    if asked and torch.is_inference_mode_enabled():
        found = "torch.inference_mode, in which torch keeps no graph"
        raise ModelStateError("gradients", found, "leave it, or use torch.no_grad, which changes nothing here")


def check_result(taps: Taps) -> None:
    """Whether what each head writes is not asked for under a rule that takes the output projection as a whole."""
    named = sorted(name for name in taps.names if name.endswith("attn.hook_result"))
    if named and taps.rules.linear_gamma:
        found = "the gamma rule acts on the output projection as a whole, not on each head's part"
        raise UnsupportedFeatureError(
            f"{named[0]} under Rules(linear_gamma={taps.rules.linear_gamma})", found, "use z in place of result"
        )


def check_fired(taps: Taps) -> None:
    """Whether every site that something was to happen at was passed."""
    silent = sorted(taps.names - taps.held - taps.fired)
    if not silent:
        return
    found = f"it did not fire in this run ({len(silent)} silent)"
    first = 0 if taps.start is None else taps.start.layer
    below = [n for n in silent if taps.start is not None and ("embed" in n or (parse(n)[1] or 0) < first)]
    if below:
        fix = f"the run starts at block {first}: name sites from there on"
        raise UnsupportedFeatureError(f"site {below[0]}", found, fix)
    fix = "the model's own code does not pass through it; use another attention implementation or model class"
    raise UnsupportedFeatureError(f"site {silent[0]}", found, fix)


def check_metric(value: object, batch: Batch) -> None:
    """Whether a metric gave one number a row."""
    if not isinstance(value, Tensor) or value.shape != (len(batch),):
        gave = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SettingError("a metric", f"it returned {gave}", f"return one number a row, shape ({len(batch)},)")


def no_gradient() -> SettingError:
    """The error of a metric that cannot be differentiated."""
    found = "it does not follow from the logits by differentiable steps (argmax, detach and comparisons are none)"
    return SettingError("the gradient of a metric", found, "use a differentiable metric, or a method without gradients")


def check_finite(
    logits: Tensor, batch: Batch, activations: Callable[[], Mapping[str, Tensor]], sites: Sequence[str]
) -> None:
    """Whether the logits of all real tokens are finite; if not, `activations` of all sites show where it begins."""
    if bool(torch.isfinite(logits.sum())) or bool(torch.isfinite(logits[batch.mask]).all()):
        return
    found = activations()
    for name in sites:
        x = found.get(name)
        axes = site_spec(name).axes
        if x is None or position_axis(axes) != 1:  # masked scores are infinite by design
            continue
        if not bool(torch.isfinite(x[(batch.prompt if reads_source(axes) else batch).mask]).all()):
            raise NonFiniteError(
                "a forward pass",
                f"NaN or infinity, first at {name} (dtype {x.dtype})",
                "use a wider dtype, such as bfloat16 or float32, or look at the edits that touch this site",
            )
    raise NonFiniteError("a forward pass", "NaN or infinity in the logits only", "use a wider dtype, such as float32")


def check_pass(going: bool, at: Iterable[str] | None, names: Iterable[str], *, metric: bool = True) -> None:
    """Whether a backward pass can be made: the graph is there, and the pass starts at gradient sites or a metric."""
    if not going:
        raise ModelStateError("another backward pass", "the last one let the graph go", "leave out last=True")
    if at is None and not metric:
        fix = "give gradients at sites, at={site: gradient}, or make the tape with metric="
        raise SettingError("a backward pass from the metric", "the tape has none", fix)
    unknown = sorted(set(at or ()) - set(names))
    if unknown:
        fix = nearest(unknown[0], names)
        raise UnknownNameError(f"a backward pass from {unknown[0]}", "it is no gradient site of this run", fix)


def check_batched(at: Mapping[str, Tensor], blanks: Mapping[str, Tensor]) -> int:
    """The number of gradients that are given at each site."""
    shapes = {name: tuple(gradient.shape) for name, gradient in at.items()}
    counts = {shape[0] for shape in shapes.values() if shape}
    wrong = [name for name, shape in shapes.items() if shape[1:] != tuple(blanks[name].shape)]
    if len(counts) != 1 or wrong or 0 in counts:
        found = f"shapes {shapes}" if at else "no site"
        expected = {name: ("n", *blank.shape) for name, blank in blanks.items()}
        raise SettingError(
            "several backward passes in one", found, f"give gradients of shape {expected}, one n for all"
        )
    return counts.pop()
