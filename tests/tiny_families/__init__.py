"""Tiny teachers of the families beyond Stable Diffusion, and how the stock pipeline of each is used: a module a family.

`tests/models/test_families.py` holds every one of them to the same tests.
"""

from tiny_families import flux, flux2_klein, kolors, qwen_image, sd3, z_image
from tiny_families.case import Case

MODULES = (flux, flux2_klein, kolors, qwen_image, sd3, z_image)
CASES: dict[str, Case] = {module.CASE.family: module.CASE for module in MODULES}
