"""Which stages of a recipe run, and where their results are."""

from ..training.replay import differ
from .errors import BadArgument, ProcessLost, RunError
from .fingerprint import Located
from .planning import PlannedStage
from .running import device_here, plan, replay, run

__all__ = [
    "BadArgument",
    "Located",
    "PlannedStage",
    "ProcessLost",
    "RunError",
    "device_here",
    "differ",
    "plan",
    "replay",
    "run",
]
