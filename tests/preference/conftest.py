"""Pictures to judge by hand, and the page that asks."""

from labelling import choices, opened, served

__all__ = ["choices", "opened", "served"]
