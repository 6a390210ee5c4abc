"""The hash of a folder is that of the files loaded from it, links followed, and never runs without end."""

import os
import shutil
from pathlib import Path

import pytest

from mlcm_rl.storage.hashing import contents_hash, folder_hash, sha256

HASHES = [folder_hash, contents_hash]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a part, and two others of that part's kind beside it."""
    for name in ("folder/unet", "one", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / "folder" / "model_index.json").write_text("{}")
    return tmp_path / "folder"


def linked(folder: Path, **links: str) -> Path:
    """`folder` with these links in it, to folders beside it."""
    for name, target in links.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(Path("..") / target)
    return folder


@pytest.mark.parametrize("of", HASHES)
def test_a_linked_part_counts_as_a_copied_one_and_another_is_noticed(folder, of):
    shutil.rmtree(folder / "unet")
    one, other = of(linked(folder, unet="one")), of(linked(folder, unet="other"))
    assert one != other
    (folder / "unet").unlink()
    shutil.copytree(folder.parent / "other", folder / "unet")
    assert of(folder) == other


@pytest.mark.parametrize("of", HASHES)
def test_a_linked_file_is_hashed_as_what_it_leads_to(folder, of):
    config = folder / "unet" / "config.json"
    before, text = of(folder), config.read_text()
    config.unlink()
    (folder.parent / "elsewhere").write_text(text)
    config.symlink_to(folder.parent / "elsewhere")
    assert of(folder) == before
    config.unlink()
    config.symlink_to(folder.parent / "other" / "config.json")
    assert of(folder) != before


@pytest.mark.parametrize("of", HASHES)
def test_links_in_a_circle_and_links_upon_links_come_to_an_end(folder, of):
    (folder / "unet" / "up").symlink_to(folder)
    for depth in range(40):  # each of two links leads to the same next folder: a million million ways in all
        place = folder / f"deep{depth}"
        place.mkdir()
        for name in ("left", "right"):
            (place / name).symlink_to(folder / f"deep{depth + 1}")
    assert of(folder) == of(folder)


@pytest.mark.parametrize("of", HASHES)
def test_which_of_two_folders_a_third_link_leads_to_is_seen(folder, of):
    first = of(linked(folder, a="one", b="other", c="one"))
    assert of(linked(folder, c="other")) != first


def test_a_pipe_and_a_device_are_refused_where_they_would_be_hashed(folder):
    os.mkfifo(folder / "unet" / "weights.json")
    with pytest.raises(ValueError, match=r"weights\.json: a pipe, a socket or a device"):
        folder_hash(folder)
    contents_hash(folder)  # of files
    with pytest.raises(ValueError, match="/dev/zero: a pipe"):
        sha256(Path("/dev/zero"))
