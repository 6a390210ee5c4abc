"""SIGKILL at moments that nobody chose: the run started again ends with the same bits as one never killed.

The runs are forked off a process that has imported everything, so that a kill costs no start-up.
"""

import random
import time
from pathlib import Path

import forked
import pytest
from forked import FORKS

import runs
from mlcm_rl.recipe import Recipe


class Killed:
    """Runs recipes in processes that are killed after random delays of up to `longest` seconds."""

    def __init__(self, seed: int):
        self.draws = random.Random(seed)

    def whole(self, recipe: Recipe) -> float:
        """Run `recipe` and leave it alone; the seconds that it took, less those that a process takes to begin."""
        for target, arguments in ((time.time, ()), (forked.run, (recipe.model_dump_json(),))):
            started = time.monotonic()
            process = FORKS.Process(target=target, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == 0
        return time.monotonic() - started

    def run(self, recipe: Recipe, longest: float, num_kills: int) -> int:
        """Run `recipe` again and again, killed each time, until it is done or was killed `num_kills` times and may end;
        returns how often it was killed."""
        for kills in range(num_kills + 1):
            process = FORKS.Process(target=forked.run, args=(recipe.model_dump_json(),))
            process.start()
            process.join(self.draws.uniform(0, longest) if kills < num_kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
        assert process.exitcode == 0
        return kills


def killed_until(num_kills: int, recipe: Recipe, folder: Path, seed: int) -> int:
    """Run copies of `recipe` until they were killed `num_kills` times in all, each held to one that was not killed."""
    killed, kills = Killed(seed), 0
    seconds = killed.whole(recipe)
    expected = runs.results(recipe)
    for number in range(num_kills):
        copy = recipe.model_copy(update={"runs": str(folder / f"copy-{number}")})
        kills += killed.run(copy, seconds / 4, num_kills - kills)
        assert runs.results(copy) == expected
        if kills == num_kills:
            break
    return kills


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_same_bits(tiny_sdxl, tmp_path):
    recipe = runs.of_kinds(tiny_sdxl, tmp_path, ("trajectories", "distill", "feedback"))
    assert killed_until(5, recipe, tmp_path, seed=1) == 5


@pytest.mark.slow
def test_runs_of_every_stage_killed_a_hundred_times_end_with_the_same_bits(tiny_sdxl, tmp_path):
    assert killed_until(100, runs.of_kinds(tiny_sdxl, tmp_path, runs.KINDS), tmp_path, seed=2) == 100
