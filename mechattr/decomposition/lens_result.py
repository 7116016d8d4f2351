"""What lenses return: predictions read from residual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from mechattr.decomposition.result import Decomposition

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Lens(Decomposition):
    """Predictions from the residual streams of a prompt, site by site: `top/token` and `top/probability` [site, pos,
    rank], `score/kl` and, of a target, `score/logit`, `score/probability` and `score/rank` [site, pos]."""

    kind: ClassVar[str] = "lens"

    def word(self, token: int) -> str:
        """A token among those in `top/token`, as text."""
        return cast(dict[str, str], self.settings["vocabulary"])[str(token)]

    def to_pandas(self, table: str | None = None) -> pd.DataFrame:
        """A table in long form, as of any decomposition; those of the likeliest tokens say which, in `top_token`."""
        frame = super().to_pandas(table)
        if table in (None, "top/probability"):
            tokens = super().to_pandas("top/token")["value"]
            words = [self.word(token) for token in tokens[tokens >= 0]]
            frame.insert(len(frame.columns) - 1, "top_token", words)
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the likeliest token of each site and position; see `mechattr.draw.lens_table`.

        Raises:
            SettingError: a result of several prompts.
        """
        from mechattr import draw

        return draw.lens_table(self, ax=ax)
