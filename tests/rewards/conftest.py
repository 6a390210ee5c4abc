"""A reward model of another distribution."""

from installed_rewards import installed

__all__ = ["installed"]
