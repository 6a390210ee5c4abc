"""Whatever is done to a recipe's text, the loader gives a Recipe or a RecipeError, and its errors can be printed."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlcm_rl.recipe import Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError

GOOD = Path(__file__).with_name("good.yaml").read_text("utf-8")
WORDS = """
1e-5 -1 0 no yes null ~ '' "7" .inf -.inf .nan [] {} {a:1} 0x1f 0o17 0b11 1_000 12:30 2001-13-45 1e400
kind: - &a *a <<: !x !!int !!set ? : | > # --- ... ' " @ ` [ { ] }
"""
CHARACTERS = ["\t", "  ", "\n", "\r\n", "\x85", "\0", "\u2028", "\ufeff", "\U0001f600"]
LONG = [
    "%YAML 1.1\n---\n",
    "kind: distill",
    "<<: *a",
    "!!int ",
    "!!bool x",
    "9" * 5000,
    '"\\ud800"',
    '"\\0"',
    "[[1, 2], 3]",
]
SCRAPS = WORDS.split() + CHARACTERS + LONG

replaced = st.tuples(st.just("replace"), st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SCRAPS))
insertions = st.tuples(st.just("replace"), st.integers(0, len(GOOD)), st.integers(0, 3), st.text(max_size=5))
moves = st.tuples(
    st.just("line"), st.integers(0, 40), st.integers(0, 40), st.sampled_from(["drop", "repeat", "indent"])
)
valued = st.tuples(st.just("value"), st.integers(0, 40), st.just(0), st.sampled_from(SCRAPS))
mutations = st.lists(st.one_of(replaced, insertions, moves, valued), min_size=1, max_size=4)

keys = st.sampled_from(
    ["seed", "stages", "stages.1", "stages.1.num_steps.0", "stages[distill].adapter.rank", "samples.x"]
)
overrides = st.tuples(keys, st.sampled_from(SCRAPS)).map("=".join)


def mutated(text: str, mutation: tuple[str, int, int, str]) -> str:
    how, at, more, what = mutation
    if how == "replace":
        return text[:at] + what + text[at + more :]
    lines = text.splitlines(keepends=True)
    if not lines:
        return text
    i, j = at % len(lines), more % len(lines)
    if how == "value":
        lines[i] = lines[i].split(":")[0] + ": " + what + "\n"
    elif what == "drop":
        del lines[i]
    elif what == "repeat":
        lines.insert(j, lines[i])
    else:
        lines[i] = " " * (more % 5) + lines[i].lstrip(" ")
    return "".join(lines)


def holds(data: bytes, overrides: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(data)
        try:
            result = load(path, overrides, root=Path(folder))
        except RecipeError as error:
            result = error
    if isinstance(result, RecipeError):
        assert result.problems
        assert all(problem.text and str(problem).startswith(str(path)) for problem in result.problems)
    else:
        assert isinstance(result, Recipe)


def mutate_and_load(changes: list) -> None:
    text = GOOD
    for change in changes:
        text = mutated(text, change)
    holds(text.encode("utf-8", "replace"), [])


QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(mutations)
def test_a_mutated_recipe_is_a_recipe_or_a_recipe_error(changes):
    mutate_and_load(changes)


@QUICK
@given(st.lists(st.text(max_size=30) | overrides, min_size=1, max_size=3))
def test_any_override_is_a_recipe_or_a_recipe_error(texts):
    holds(GOOD.encode(), texts)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(mutations)
def test_many_mutated_recipes_are_recipes_or_recipe_errors(changes):
    mutate_and_load(changes)


@pytest.mark.slow
@settings(max_examples=1_500, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**32))
def test_bytes_in_a_recipe_are_a_recipe_or_a_recipe_error(data, seed):
    good = GOOD.encode()
    at = random.Random(seed).randrange(len(good))
    holds(good[:at] + data + good[at + len(data) // 2 :], [])
