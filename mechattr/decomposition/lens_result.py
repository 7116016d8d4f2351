"""What lenses return: predictions read from residual streams, and from what attention adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from mechattr.decomposition.result import Decomposition

if TYPE_CHECKING:
    import pandas as pd


class Lens(Decomposition):
    """A decomposition that names the likeliest tokens: their ids in `top/token` [..., rank], beside their
    `top/probability` (logit lens) or `top/logit` (token lens), and as text in `settings["vocabulary"]`."""

    kind: ClassVar[str] = "lens"

    def word(self, token: int) -> str:
        """A token among those in `top/token`, as text."""
        return cast(dict[str, str], self.settings["vocabulary"])[str(token)]

    def to_pandas(self, table: str | None = None) -> pd.DataFrame:
        """A table in long form, as of any decomposition; those of the likeliest tokens say which, in `top_token`."""
        frame, name = super().to_pandas(table), table or str(self.settings["main"])
        if not name.startswith("top/"):
            return frame
        tokens = super().to_pandas("top/token")["value"]
        tokens = tokens[tokens >= 0]  # -1 at padding
        frame = frame if name != "top/token" else frame.loc[tokens.index].reset_index(drop=True)
        frame.insert(len(frame.columns) - 1, "top_token", [self.word(token) for token in tokens])
        return frame
