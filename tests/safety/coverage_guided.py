"""Looks for inputs that the readers neither read nor refuse, guided by which of their lines each input reaches.

    PYTHONPATH=.:tests python -m safety.coverage_guided prompts -atheris_runs=20000

Needs atheris (extra `fuzz`). Ends with the exception where it finds one.
"""

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["mlcm_rl"]):
    from mlcm_rl.data import prompts
    from mlcm_rl.recipe import file
    from mlcm_rl.storage import untrusted  # noqa: F401
    from safety import test_fuzz


def recipe(data: bytes) -> None:
    test_fuzz.try_file(file.load, prompts, "recipe.yaml")


READERS: dict[str, Callable[[bytes], None]] = {
    "recipe": recipe,
    "prompts": lambda data: test_fuzz.try_prompts(prompts, ".jsonl"),
    "tensors": test_fuzz.try_tensors,
    "picture": test_fuzz.try_picture,
    "wheel": test_fuzz.try_wheel,
}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, READERS[name])
    atheris.Fuzz()
