"""The distilled student that preference learning starts from."""

from tuning_runs import distilled

__all__ = ["distilled"]
