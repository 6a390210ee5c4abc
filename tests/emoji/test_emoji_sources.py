"""Fetching, reading and rendering, on made-up archives: no network."""

import io
import json
import tarfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import sources

RED_SQUARE = '<path fill="#ff0000" d="M0 0h8v8h-8z"/>'


def write_archive(path: Path, members: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    return tmp_path


def test_a_download_that_is_not_the_pinned_one_is_refused_and_removed(cache):
    package = sources.PACKAGES["noto"]
    path = cache / "packages" / package.archive
    path.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=sha256(b"something else").hexdigest()):
        sources.fetch(package)
    assert not path.exists()


def test_a_download_in_the_cache_is_taken_without_asking_the_client(cache, monkeypatch):
    package = replace(sources.PACKAGES["noto"], sha256=sha256(b"abc").hexdigest())
    (cache / "packages" / package.archive).write_bytes(b"abc")
    monkeypatch.setattr(sources.subprocess, "run", lambda *a, **k: pytest.fail("the client was called"))
    assert sources.fetch(package).read_bytes() == b"abc"


def test_every_package_is_pinned_by_version_and_sha256():
    for package in (*sources.PACKAGES.values(), sources.OPENMOJI):
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version in package.archive


def test_the_variation_selector_is_no_part_of_a_codepoint():
    assert sources.normalise("2764-fe0f-200d-1f525") == "2764-200D-1F525"


def test_drawings_follow_plain_aliases_and_leave_transformed_ones_out(tmp_path, monkeypatch):
    icons = {
        "width": 8,
        "height": 8,
        "icons": {"square": {"body": RED_SQUARE}, "wide": {"body": RED_SQUARE, "width": 16}},
        "aliases": {"same": {"parent": "square"}, "mirrored": {"parent": "square", "hFlip": True}},
    }
    names = {"1f1": "square", "1f2": "wide", "1f3-fe0f": "same", "1f4": "mirrored", "1f5": "absent"}
    archive = write_archive(tmp_path / "a.tgz", {"icons.json": icons, "chars.json": names})
    monkeypatch.setattr(sources, "fetch", lambda package: archive)
    drawings = sources.read_drawings("noto")
    assert set(drawings) == {"1F1", "1F2", "1F3"}
    assert 'viewBox="0 0 16 8"' in drawings["1F2"], "the icon's own width wins over the set's"
    assert drawings["1F3"] == drawings["1F1"]


def test_concepts_need_a_group_and_a_name_in_both_languages(tmp_path, monkeypatch):
    def entry(code, label, **more):
        return {"hexcode": code, "label": label, "group": 3, "subgroup": 5, **more}

    members = {
        "en/messages.json": {
            "groups": [{"order": 3, "key": "animals"}],
            "subgroups": [{"order": 5, "key": "mammal"}],
        },
        "en/data.json": [
            entry("1F43C", "panda", tags=["bear"]),
            entry("1F43D", "no Chinese name"),
            {"hexcode": "1F1E6", "label": "no group"},
        ],
        "zh/data.json": [entry("1F43C", "熊猫"), {"hexcode": "1F1E6", "label": "没有组"}],
    }
    archive = write_archive(tmp_path / "a.tgz", members)
    monkeypatch.setattr(sources, "fetch", lambda package: archive)
    assert sources.list_concepts() == [sources.Concept("1F43C", "animals", "mammal", "panda", "熊猫", ("bear",), ())]


def test_a_drawing_is_rendered_on_white_at_the_asked_size():
    pytest.importorskip("resvg_py", reason="rendering needs resvg-py")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 8">{RED_SQUARE}</svg>'
    pixels = sources.render(svg, 32)  # twice as wide as high: 32 x 16 in the middle, its left half red
    assert pixels.shape == (32, 32, 3)
    wanted = np.full((32, 32, 3), 255, np.uint8)
    wanted[8:24, :16] = (255, 0, 0)
    np.testing.assert_array_equal(pixels, wanted)


def test_the_cached_pictures_are_the_packages_drawings():
    if not (sources.cache_folder() / "pictures_64.json").exists():
        pytest.skip("the packages have not been fetched: python recipes/emoji/build/sources.py")
    pytest.importorskip("resvg_py", reason="rendering needs resvg-py")
    pictures = sources.load_pictures(64)
    row = next(i for i, pair in enumerate(zip(pictures.codepoints, pictures.styles, strict=True)) if pair[1] == "noto")
    svg = sources.read_drawings("noto")[pictures.codepoints[row]]
    np.testing.assert_array_equal(pictures.pixels[row], sources.render(svg, 64))
