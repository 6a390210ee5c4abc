"""What commands are given: a recipe, a reward model of another distribution, pictures to judge by hand."""

from good_recipe import root
from installed_rewards import installed
from labelling import choices, opened, served

__all__ = ["choices", "installed", "opened", "root", "served"]
