"""Tiny teachers of the transformer families, and how the stock pipeline of each is used: a module a family.

`tests/models/test_families.py` holds every one of them to the same tests.
"""

from tiny_families import hunyuan_dit, pixart_sigma, qwen_image, sana, sd3, z_image
from tiny_families.case import Case

MODULES = (sd3, z_image, qwen_image, hunyuan_dit, pixart_sigma, sana)
CASES: dict[str, Case] = {module.CASE.family: module.CASE for module in MODULES}
