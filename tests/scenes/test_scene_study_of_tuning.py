"""The study of tuning on scenes: valid stages at equal calls, curves and table by hand, DiffusionNFT's loss."""

import json

import nft
import pytest
import torch
import tuning
import tuning_curves
import tuning_summary

from mlcm_rl.recipe import Feedback, Policy
from mlcm_rl.recipe.file import load


@pytest.mark.parametrize("group", tuning.ROWS)
def test_every_row_is_a_valid_stage_of_its_own(group):
    base = load(tuning.RECIPES / "scenes_demo.yaml", [])
    stages = {row: tuning.stage_of(base, group, row, 3) for row in tuning.ROWS[group]}
    assert all(isinstance(stage, Feedback | Policy) and stage.seed == 3 for stage in stages.values())
    assert len({stage.model_dump_json() for stage in stages.values()}) == len(stages)
    assert {stage.gamma for stage in stages.values()} == {tuning.GAMMA}
    calls = {stage.batch_size * stage.num_steps for stage in stages.values()}
    assert calls == {8000}
    assert all({one.name for one in stage.guard.rewards}.isdisjoint(stage.max_drops) for stage in stages.values())


def look(step: int, distance: float, trained: float, held_out: float) -> dict:
    gains = {"guard/trained_gain": trained, "guard/held_out_gain": held_out}
    return {"step": step, "guard/distance": distance, **gains}


def stage_folder(place, looks: list[dict], kept: int, name: str):
    place.mkdir()
    (place / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in looks))
    (place / "guard.json").write_text(json.dumps({"kept_step": kept, "stopped": False}))
    (place / "manifest.json").write_text(json.dumps({"recipe": {"name": name}}))
    return place


def test_looks_are_averaged_over_seeds_as_far_as_all_go(tmp_path):
    folders = [
        stage_folder(tmp_path / "0", [look(25, 0.1, 1.0, 0.5), look(50, 0.2, 2.0, 0.0)], 25, "a-0"),
        stage_folder(tmp_path / "1", [look(25, 0.3, 2.0, 1.5)], 25, "a-1"),
    ]
    begin, only = tuning_curves.averaged(folders, batch_size=32)
    assert set(begin.values()) == {0.0}
    assert only == {
        "guard/distance": pytest.approx(0.2),
        "guard/trained_gain": 1.5,
        "guard/held_out_gain": 1.0,
        "calls": 800.0,
    }


def test_the_table_has_paired_differences_of_seeds_averaged_by_prompt(tmp_path):
    def row(name: str, values: list[float]) -> dict:
        return {"name": name, "role": "student", "metrics": {"right@all": {"values": values}}}

    report = {"rows": [row("student", [0.0, 1.0]), row("a-0", [1.0, 1.0]), row("a-1", [0.0, 1.0])]}
    folders = [stage_folder(tmp_path / name, [look(25, 0.1, 1.0, 0.5)], 25, name) for name in ("a-0", "a-1")]
    *_, before, line = tuning_summary.text(report, [("a", folder) for folder in folders]).splitlines()
    assert before == "| before tuning | - | 0 | 0.500 +- 0.500 |"
    assert line == "| a | 25 of 25, 25 of 25 | 0.1000 | 0.750 +- 0.250 (+0.250 +- 0.250) |"


def test_nfts_loss_pulls_to_good_samples_and_away_from_bad_ones_by_hand():
    """On policy both implicit policies are the old one; their gradients are opposite, so that the shares decide."""
    old, sample = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    x0 = old.clone().requires_grad_()
    positive, negative = nft.implicit_errors(x0, old, sample, strength=0.5)
    assert positive.tolist() == negative.tolist() == [pytest.approx(2.5 / 1.5)]
    (up,) = torch.autograd.grad(positive.sum(), x0, retain_graph=True)
    (down,) = torch.autograd.grad(negative.sum(), x0)
    torch.testing.assert_close(up, 0.5 * (old - sample) / 1.5)
    torch.testing.assert_close(down, -up)
    shares = nft.optimality(torch.tensor([[1.0, 2.0, 6.0]]), clip=2.0)
    assert shares.tolist() == [[0.0, 0.25, 1.0]]
