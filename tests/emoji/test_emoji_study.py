"""The study's summary: seeds averaged prompt by prompt, pairs picked on other prompts than they are measured on."""

import pytest

import study_summary


def row(name: str, values: list[float], n: int = 4, role: str = "student", sampler: str = "gamma 0") -> dict:
    metrics = {"distance": {"values": values}}
    return {"role": role, "name": name, "sampler": sampler, "num_evaluations": n, "metrics": metrics}


def test_seeds_are_averaged_and_phases_are_students_of_their_own():
    rows = [row("a-b-0", [1.0] * 5), row("a-b-1", [3.0] * 5), row("a-b-1 phase-0-K8", [7.0] * 5)]
    found = study_summary.values({"rows": rows}, "student", "distance")
    assert found["a-b", "gamma 0"][4].tolist() == [2.0] * 5
    assert found["a-b phase-0-K8", "gamma 0"][4].tolist() == [7.0] * 5


def test_pairs_are_picked_on_the_first_fifth_and_measured_on_the_rest():
    """The lucky one is best on the one picking prompt and worse on all others; it is picked all the same."""
    rows = [row("lucky-0", [0.0, 9.0, 9.1, 9.2, 9.3]), row("steady-0", [1.0, 2.0, 2.1, 2.2, 2.3])]
    rows += [row("teacher", [5.0, 5.0, 5.1, 5.2, 5.3], role="undistilled", sampler="DDIM")]
    text = study_summary.text({"rows": rows})
    assert (
        "4 evaluations, lucky, gamma 0 against the undistilled teacher (teacher, DDIM): 4.0000 +- 0.0000, missed"
        in text
    )
    assert "| steady, gamma 0 | 2.1500 +- 0.0645 |" in text


@pytest.mark.parametrize(("single", "verdict"), [(1.05, "met"), (1.2, "missed")])
def test_one_student_is_set_against_the_best_dedicated_one_at_every_budget(single, verdict):
    rows = [row(name, [value] * 10, n) for n in (2, 3, 4, 6, 8) for name, value in
            (("fixed-8-0", 2.0), ("fixed-4-trajectory-0", 1.0), ("budgets-0", single))]  # fmt: skip
    assert f"budgets over the best dedicated student: {single:.2f} at 2" in study_summary.text({"rows": rows})
    assert study_summary.text({"rows": rows}).endswith(f"within 10 % {verdict}")
