"""Tiny teachers of the families beyond Stable Diffusion, and how the stock pipeline of each is used: a module a family.

`tests/models/test_families.py` holds every one of them to the same tests.
"""

from tiny_families import flux, flux2_klein, hunyuan_dit, kolors, pixart_sigma, qwen_image, sana, sd3, z_image
from tiny_families.case import Case

MODULES = (kolors, sd3, flux, flux2_klein, z_image, qwen_image, hunyuan_dit, pixart_sigma, sana)
CASES: dict[str, Case] = {module.CASE.family: module.CASE for module in MODULES}
