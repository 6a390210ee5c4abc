"""A good recipe and what becomes of it."""

from good_recipe import broken, root

__all__ = ["broken", "root"]
