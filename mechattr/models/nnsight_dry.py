"""The offline test of a remote run: a trace as a server would get it, run here.

nnsight's own dry run checks that what is sent can be read where local modules are missing, and then runs what was not
sent. This one runs what arrived, so that a function which leaves something behind in this process fails as it would
on a server. Imported with nnsight only.
"""

from __future__ import annotations

import sys
from typing import Any

from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.util import push


class DryRun(LocalSimulationBackend):
    """Sends a trace to this process."""

    def __call__(self, tracer: Any) -> None:
        """Serialises the trace, reads it with local modules hidden, runs it, and hands its results to the caller."""
        pull_env()
        blob = RequestModel.serialize(tracer)
        objects, path = self.model._remoteable_persistent_objects(), list(sys.path)
        hidden = self._hide_local_modules()
        sys.modules["mechattr"] = None  # type: ignore[assignment]  # cannot be imported, even where it is installed
        try:
            arrived = RequestModel.deserialize(blob, objects)
        finally:
            del sys.modules["mechattr"]
            self._restore(hidden)
            sys.path[:] = path  # put back in another order
        arrived.execute(arrived.info.code)
        push(tracer.info.frame, {"found": arrived.info.frame.f_locals["found"]})
