"""Tiny teachers of the transformer families, and how the stock pipeline of each is used: a module a family.

`tests/models/test_families.py` holds every one of them to the same tests.
"""

from tiny_families import sd3
from tiny_families.case import Case

CASES: dict[str, Case] = {case.family: case for case in (sd3.CASE,)}
