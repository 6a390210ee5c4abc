"""The store as files: what is kept of a trajectory and of a prompt, who writes it, how it is opened and read."""

import copy
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.data import store_writer, trajectory_store
from mlcm_rl.data.store_writer import Writer
from mlcm_rl.data.trajectory_store import Provenance, Store
from mlcm_rl.equations.segments import milestones
from mlcm_rl.storage.files import CheckpointError, read_json, write_json
from mlcm_rl.storage.hashing import sha256
from mlcm_rl.storage.tensors import read_tensors, write_tensors
from mlcm_rl.training import processes

BUDGETS = {"num_segments": [1], "condition_on_target": True, "budgets": [2, 4], "distance": "log_l2"}


def provenance(**changes) -> Provenance:
    settings = {
        **{"teacher_hash": "x", "scheduler": {}, "prediction_type": "epsilon", "solver": "ddim", "prompts_hash": "y"},
        **{"grid": [999, 500, 0], "guidance_scale": 3.0, "num_trajectories": 5, "num_held_out": 2, "seed": 0},
        **{"dtype": "float32", "maths": 1, "times": [999, 0]},
    }
    return Provenance(**(settings | changes))


def prompts_of(rows: range) -> dict[str, torch.Tensor]:
    """Conditioning of prompts of 1, 2, 3, 1, 2, ... tokens, each of which says whose it is."""
    lengths = torch.tensor([1 + i % 3 for i in rows])
    context = torch.stack([torch.full((3, 2), float(i)) for i in rows])
    return {"context": context, "lengths": lengths, "pooled": context[:, 0]}


def states_of(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    x0 = torch.stack([torch.full((1, 2, 2), float(i)) for i in rows])
    return torch.stack([x0 + 100, x0], 1), x0


def write(folder: Path, num_prompts: int = 4, **changes) -> Store:
    writer = Writer(folder, provenance(**changes), num_prompts, shard_size=2, batch_size=2)
    for rows in writer.claimed("prompts"):
        writer.write_prompts(rows, prompts_of(rows), torch.float16)
    writer.gather("prompts")
    for rows in writer.claimed("shards"):
        writer.write(rows, *states_of(rows))
    writer.finish()
    return Store(folder)


# ---- prompts ----


def test_a_prompt_is_stored_once_without_padding_in_the_encoders_type(tmp_path):
    store = write(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [
        *(f"prompts-{i:07d}.safetensors" for i in (0, 2)),
        *(f"shard-{i:07d}.safetensors" for i in (0, 2, 4, 6)),
    ]
    stored = read_tensors(tmp_path / names[0])
    assert stored["context"].shape == (1 + 2, 2)  # tokens of prompts 0 and 1
    assert stored["context"].dtype == torch.float16
    found = store.conditioning(torch.tensor([6, 1, 4, 3]))  # prompts 2, 1, 0, 3 of 4
    assert found["lengths"].tolist() == [3, 2, 1, 1]
    assert found["pooled"].tolist() == [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]
    assert found["context"].dtype == torch.float32
    assert found["context"][..., 0].tolist() == [[2.0, 2.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]
    assert store.conditioning(torch.tensor([0, 3]))["context"].shape == (2, 1, 2)  # as long as the longest of them


def test_prompts_in_half_precision_are_read_under_autocast(tmp_path):
    store = write(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        under = store.conditioning(torch.tensor([0, 2]))
    plain = store.conditioning(torch.tensor([0, 2]))
    assert all(torch.equal(under[name], plain[name]) and under[name].dtype == plain[name].dtype for name in plain)


def test_lengths_that_are_not_those_of_the_tokens_are_refused(tmp_path):
    store = write(tmp_path)
    path = tmp_path / "prompts-0000000.safetensors"
    write_tensors(path, read_tensors(path) | {"lengths": torch.tensor([2, 2])})
    record = json.loads((tmp_path / "store.json").read_text())
    record["prompts"][path.name] = [path.stat().st_size, sha256(path)]
    write_json(tmp_path / "store.json", record)
    with pytest.raises(CheckpointError, match="does not hold as many tokens as its lengths say"):
        Store(store.folder).conditioning(torch.tensor([0]))


# ---- states ----


def names_of(recipe) -> list[str]:
    return [planned.folder.name.split("-", 2)[-1] for planned in pipeline.plan(recipe)]


def test_what_later_stages_read_is_what_is_stored(tiny_sdxl, tmp_path):
    """Same fingerprints, the same student to the bit; a third of the states where 24 steps are solved."""
    prompts = runs.write_prompts(tmp_path)
    students, stores = [], []
    for place, keep in (("auto", "auto"), ("all", "all")):
        home = tmp_path / place
        home.mkdir()
        stages = [runs.trajectories(prompts, keep=keep, solver_steps=24), runs.distill(**BUDGETS)]
        store, student = pipeline.run(runs.recipe(tiny_sdxl, home, stages))
        students.append(student)
        stores.append(Store(store.folder))
    assert stores[0].folder.name == f"{stores[1].folder.name}-milestones"
    assert students[0].fingerprint == students[1].fingerprint
    assert stores[0].times == milestones(8).flip(0).tolist()
    assert len(stores[1].times) == 25
    few, whole = (next(one.folder.glob("shard-*")).stat().st_size for one in stores)
    assert whole > 2.4 * few  # 26 latents for 10
    weights = [next((student.folder / "student").rglob("*.safetensors")) for student in students]
    assert sha256(weights[0]) == sha256(weights[1])


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([], "all"),  # whatever another recipe will read
        ([BUDGETS], "milestones"),
        ([{"num_segments": [8, 1]}], "all"),
        ([{"num_segments": [1], "method": "inter_segment"}], "all"),
        ([BUDGETS, {"num_segments": [1], "method": "inter_segment"}], "milestones"),  # that reads x0
        ([BUDGETS, BUDGETS | {"budgets": []}], "all"),
    ],
    ids=str,
)
def test_which_states_are_stored(tiny_sdxl, tmp_path, later, expected):
    stages = [runs.trajectories("p.txt"), *(runs.distill(**settings) for settings in later)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    assert recipe.stages[0].keeps(recipe) == expected


def test_feedback_reads_what_its_students_own_distillation_drew(tiny_sdxl, tmp_path):
    tuned = runs.tuning("feedback", "p.txt", consistency=1.0)
    for settings, expected in ((BUDGETS, "milestones"), ({"num_segments": [1], "method": "inter_segment"}, "all")):
        stages = [runs.trajectories("p.txt"), runs.distill(**BUDGETS), runs.distill(**settings), tuned]
        recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
        assert recipe.stages[0].keeps(recipe) == expected


def test_a_finished_store_of_all_states_serves_where_fewer_are_read(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    everything, _ = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill()]))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(**BUDGETS)])
    planned = pipeline.plan(recipe)
    assert planned[0].folder == everything.folder
    assert planned[0].done


def test_a_store_of_milestones_that_is_asked_for_more_says_what_to_set(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts, keep="milestones", solver_steps=24), runs.distill(num_segments=[1])]
    with pytest.raises(pipeline.RunError, match=r"holds 9 of 25 states of each trajectory.*set keep: all"):
        pipeline.run(runs.recipe(tiny_sdxl, tmp_path, stages))


def test_a_store_of_milestones_under_the_name_of_a_whole_one_is_to_be_moved(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    few = [runs.trajectories(prompts, solver_steps=24), runs.distill(**BUDGETS)]
    whole = [runs.trajectories(prompts, solver_steps=24), runs.distill(num_segments=[1])]
    store, _ = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, few))
    misplaced = pipeline.plan(runs.recipe(tiny_sdxl, tmp_path, whole))[0].folder
    assert store.folder.name == f"{misplaced.name}-milestones"

    def refused(expected: str) -> None:
        way = rf"{expected}.*move .*to {re.escape(str(store.folder))}, or delete it, and run again"
        with pytest.raises(pipeline.RunError, match=way):
            pipeline.run(runs.recipe(tiny_sdxl, tmp_path, whole))

    store.folder.rename(misplaced)
    refused(r"stages\[1\] \(distill\).*holds 9 of 25 states of each trajectory.*its name is that of a store of all")
    (misplaced / "manifest.json").unlink()  # one that was not finished
    refused(
        r"stages\[0\] \(trajectories\).*begun with 9 states of each trajectory.*folder's name is that of a store of 25"
    )


# ---- who writes ----


def test_files_are_claimed_each_by_one_process(tmp_path, monkeypatch):
    """Four writers at once, as four processes have them, each in a thread: every file is written by one of them."""
    first = Writer(tmp_path, provenance(num_trajectories=40), 4, shard_size=1, batch_size=1)
    writers = [first, *(copy.copy(first) for _ in range(3))]
    taken: list[list[range]] = [[] for _ in writers]
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for rows in writers[number].claimed("shards"):
            taken[number].append(rows)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rows.start for part in taken for rows in part) == list(range(42))


def test_what_a_process_that_died_had_claimed_is_made_at_the_next_start(tmp_path):
    dead = Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)
    for rows in dead.claimed("prompts"):
        dead.write_prompts(rows, prompts_of(rows), torch.float16)
    claims = dead.claimed("shards")
    dead.write(first := next(claims), *states_of(first))
    second = next(claims)  # and dies
    assert store_writer.share_written(tmp_path, 7) == pytest.approx(2 / 7)
    alive = Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=4)
    assert [rows.start for rows in alive.missing("shards")] == [2, 4, 6]
    assert second.start == 2
    assert write(tmp_path).x0(torch.arange(7)).flatten(1)[:, 0].tolist() == list(range(7))
    assert not list(tmp_path.glob("claims-*"))
    assert not list(tmp_path.glob("*.safetensors.json"))


def test_a_file_that_another_machine_wrote_and_that_does_not_appear_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.0)
    writer = Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)
    list(writer.claimed("prompts"))  # by a process that writes to a folder of its own
    with pytest.raises(CheckpointError, match=r"prompts-0000000\.safetensors was claimed by another process"):
        writer.gather("prompts")


def test_a_file_that_appears_late_is_waited_for(tmp_path, monkeypatch):
    writer = Writer(tmp_path, provenance(), 4, shard_size=4, batch_size=2)
    (rows,) = writer.claimed("prompts")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            writer.write_prompts(rows, prompts_of(rows), torch.float16)

    monkeypatch.setattr(store_writer.time, "sleep", sleep)
    writer.gather("prompts")
    assert len(looks) == 2


def test_a_run_that_another_one_took_over_writes_no_more(tmp_path):
    """The launcher was killed, a process of it lives on, and the same command was given again."""
    orphan = Writer(tmp_path, provenance(), 4, shard_size=1, batch_size=1)
    claims = orphan.claimed("shards")
    next(claims)
    Writer(tmp_path, provenance(), 4, shard_size=1, batch_size=1)
    with pytest.raises(CheckpointError, match="is being written by another run, which began after this one"):
        next(claims)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sizes": None},
        {"batch_sizes": ["x"]},
        {"shards": {"shard-0000000.safetensors": None}},
        {"prompts": {"x": "ab"}},
    ],
    ids=str,
)
def test_a_damaged_record_of_an_unfinished_store_says_what_to_do(tmp_path, change):
    Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)
    write_json(tmp_path / "store.json", read_json(tmp_path / "store.json") | change)
    with pytest.raises(CheckpointError, match=r"store\.json is damaged: .* delete it"):
        Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"], ids=str)
def test_a_damaged_record_of_a_file_says_what_to_do(tmp_path, content):
    Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)
    (tmp_path / "shard-0000000.safetensors.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*: delete it, and the file that it is of is made again"):
        Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)


def test_a_store_whose_files_are_not_all_its_own_is_not_finished(tmp_path):
    writer = Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)
    for rows in writer.claimed("prompts"):
        writer.write_prompts(rows, prompts_of(rows), torch.float16)
    for rows in writer.claimed("shards"):
        writer.write(rows, *states_of(rows))
    shutil.copy(tmp_path / "shard-0000000.safetensors", tmp_path / "shard-0000099.safetensors")
    shutil.copy(tmp_path / "shard-0000000.safetensors.json", tmp_path / "shard-0000099.safetensors.json")
    with pytest.raises(CheckpointError, match="are not the 5 files that it names"):
        writer.finish()


# ---- older stores ----


def test_a_store_of_format_1_is_read(tmp_path):
    """As this package wrote it before: the conditioning of each trajectory in its shard, checksums alone."""
    shards = {}
    for rows in (range(2), range(2, 3)):
        states, x0 = states_of(rows)
        path = tmp_path / f"shard-{rows.start:07d}.safetensors"
        pooled = torch.stack([torch.full((3,), float(i)) for i in rows])
        write_tensors(path, {"states": states, "x0": x0, "conditioning.pooled": pooled})
        shards[path.name] = sha256(path)
    old = vars(provenance(num_trajectories=2, num_held_out=1, format=1, grid=[999, 0]))
    del old["times"]
    write_json(tmp_path / "store.json", {"provenance": old, "shard_size": 2, "shards": shards, "batch_sizes": [2]})
    store = Store(tmp_path)
    assert store.times == [999, 0]
    assert store.x0(torch.tensor([2, 0])).flatten(1)[:, 0].tolist() == [2.0, 0.0]
    assert store.states(torch.tensor([1]), torch.tensor([0])).unique().tolist() == [101.0]
    assert store.conditioning(torch.tensor([2, 1]))["pooled"].tolist() == [[2.0] * 3, [1.0] * 3]


def test_an_unfinished_store_of_format_1_is_refused_in_words(tmp_path):
    old = vars(provenance(format=1))
    write_json(tmp_path / "store.json", {"provenance": old, "shard_size": 2, "shards": {}})
    with pytest.raises(CheckpointError, match=r"was begun by an older version of this package.*delete"):
        Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=2)


# ---- reading ----


def test_a_file_that_is_written_to_while_it_is_read_reaches_no_further_step(tmp_path):
    store, first = write(tmp_path), torch.tensor([0])
    store.x0(first)
    path = tmp_path / "shard-0000000.safetensors"
    path.chmod(0o600)  # another time of change, the same bytes
    store.x0(first)
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"12345678")
    with pytest.raises(CheckpointError, match=r"was changed while it was read, and what was trained since"):
        store.x0(first)


# ---- opening ----


def test_opening_reads_no_file_but_the_record(tmp_path, monkeypatch):
    write(tmp_path)
    opened = []
    monkeypatch.setattr(trajectory_store, "read_tensors", lambda path: opened.append(path.name) or read_tensors(path))
    store = Store(tmp_path)
    assert opened == []
    store.x0(torch.tensor([3]))
    store.conditioning(torch.tensor([3]))
    assert opened == ["shard-0000002.safetensors", "prompts-0000002.safetensors"]


@pytest.mark.parametrize("change", [{"num_prompts": 0}, {"num_prompts": 10**12}, {"prompts": {}}, {"shards": {"x": 1}}])
def test_a_record_whose_numbers_do_not_agree_is_refused(tmp_path, change):
    write(tmp_path)
    write_json(tmp_path / "store.json", read_json(tmp_path / "store.json") | change)
    with pytest.raises(CheckpointError, match=r"store\.json is damaged"):
        Store(tmp_path)


def test_a_store_of_another_seed_is_not_gone_on_with(tmp_path):
    Writer(tmp_path, provenance(), 4, shard_size=2, batch_size=4)
    with pytest.raises(CheckpointError, match="seed"):
        Writer(tmp_path, provenance(seed=1), 4, shard_size=2, batch_size=4)
