"""The import arrows, names and habits of the house, held over the whole tree; each rule is also tried on violations."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from house import rules

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mlcm_rl", "reward_models")
LIBRARY = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EQUATIONS = [path for path in LIBRARY if path.parent.name == "equations"]
PROGRAMS = sorted((ROOT / "recipes").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def broken(paths: list[Path], rule) -> list[str]:
    return [f"{shown(path)}: {wrong}" for path in paths for wrong in rule(path.read_text())]


def report(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


# --- the tree ----------------------------------------------------------------------------------------------------


def test_the_tree_is_where_it_is_looked_for():
    assert len(EQUATIONS) >= 7
    assert ROOT / "mlcm_rl" / "recipe" / "__init__.py" in LIBRARY


def test_import_arrows_point_towards_the_equations():
    report([wrong for path in LIBRARY for wrong in rules.wrong_arrows(path.read_text(), dotted(path))])


def test_packages_hand_names_on_and_hold_no_code():
    """The package itself is left out: it says on which systems it runs."""
    packages = [path for path in LIBRARY if path.name == "__init__.py" and path.parent.name != "mlcm_rl"]
    assert len(packages) > len(rules.ORDER)
    report(broken(packages, rules.code_in_package))


def test_every_folder_of_the_package_has_its_place_in_the_order():
    assert {path.name for path in (ROOT / "mlcm_rl").iterdir() if (path / "__init__.py").is_file()} == set(rules.ORDER)


def test_tests_mirror_the_package():
    report(rules.unmirrored([path.relative_to(ROOT / "tests").as_posix() for path in TESTS if path.match("test_*.py")]))


def test_the_rules_stand_in_contributing():
    """Each by its test's name; those that end in `seen` try a rule on violations."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = [name for name in globals() if name.startswith("test_") and not name.endswith("seen")]
    report([f"CONTRIBUTING.md does not name {name}" for name in names if f"`{name}`" not in guide])
    report([f"CONTRIBUTING.md does not name mlcm_rl/{name}" for name in rules.ORDER if f"| `{name}` |" not in guide])


def test_programs_import_the_package_before_the_libraries_that_it_quiets():
    """Else bitsandbytes warns of a package for products that nothing here takes."""
    report(broken(PROGRAMS, rules.late_package))


def test_nothing_that_is_read_is_run():
    """One file is left out: it opens an export as its card tells people to, and runs that card's own code."""
    opens_exports = ROOT / "tests" / "parity" / "stock_samples.py"
    assert rules.unsafe_loading(opens_exports.read_text())
    report(broken([path for path in LIBRARY + PROGRAMS + TESTS if path != opens_exports], rules.unsafe_loading))


def test_files_and_functions_stay_readable():
    report(broken(LIBRARY, rules.too_long))


def test_text_is_utf8_whatever_the_locale():
    report(broken(LIBRARY + PROGRAMS, rules.locale_bound))


def test_numbers_of_the_time_axis_stand_in_one_file():
    floors = {"data", "equations", "evaluation", "preference", "stages"}
    others = {"models/base.py", "models/pictures.py", "models/sampler.py"}
    bound = [path for path in LIBRARY if path.parent.name in floors or shown(path).removeprefix("mlcm_rl/") in others]
    assert len(bound) > 30
    report(broken([path for path in bound if shown(path) != "mlcm_rl/equations/segments.py"], rules.unnamed_times))


def test_names_say_what_they_are():
    report([wrong for path in LIBRARY + PROGRAMS + TESTS for wrong in rules.vague_names(path.read_text(), shown(path))])


def test_the_word_with_two_meanings_is_not_used():
    report(broken(LIBRARY + PROGRAMS + TESTS, rules.banned_word))
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    report([shown(path) for path in recipes if rules.BANNED_WORD in rules.words(path.read_text())])


def test_equations_are_pure():
    report(broken(EQUATIONS, rules.impure))


def test_no_file_names_a_registry_or_a_folder_of_one_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes())[:8192]:
            wrong += [f"{name}: {line}" for line in rules.machine_bound(content.decode("utf-8", errors="replace"))]
    report(wrong)


def test_every_requirement_is_satisfied_by_its_pin():
    pins = ROOT / "constraints.txt"
    if not pins.exists():
        pytest.skip("no constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    report(rules.broken_floors(project["dependencies"] + extras, pins.read_text()))


# --- the rules on planted violations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("mlcm_rl.equations.solver", "import torch\nimport math\nfrom .schedule import Schedule", True),
        ("mlcm_rl.equations.solver", "import numpy", False),
        ("mlcm_rl.equations.solver", "from ..recipe import Recipe", False),
        ("mlcm_rl.equations.solver", "from mlcm_rl import recipe", False),
        ("mlcm_rl.equations.__init__", "from ..models.base import Base", False),
        ("mlcm_rl.stages.distill", "from ..models import students\nfrom ..equations import segments", True),
        ("mlcm_rl.stages.distill", "from .evaluate import run", False),
        ("mlcm_rl.stages.distill", "from . import evaluate", False),
        ("mlcm_rl.stages.distill", "from mlcm_rl.stages import evaluate", False),
        ("mlcm_rl.stages.distill", "def run():\n    import diffusers.training_utils", False),
        ("mlcm_rl.stages.distill", "from ..cli import app", False),
        ("mlcm_rl.preference.guard", "from diffusers import DDIMScheduler", False),
        ("mlcm_rl.models.sampler", "from ..stages import distill", False),
        (
            "mlcm_rl.models.families.sdxl",
            "from diffusers import StableDiffusionXLPipeline\nfrom ..base import Base",
            True,
        ),
        ("mlcm_rl.models.families.sdxl", "from ...pipeline import run", False),
        ("mlcm_rl.models.families.sdxl", "from ...storage.files import read_json", True),
        ("mlcm_rl.training.loop", "from ..models.base import Base", False),
        ("mlcm_rl.pipeline.run", "from ..stages import distill", False),
        ("mlcm_rl.pipeline.run", "import accelerate", False),
        ("mlcm_rl.recipe.types", "import torch", False),
        ("mlcm_rl.__main__", "from .cli.app import main", True),
        ("mlcm_rl.__main__", "from .pipeline import run", False),
        ("reward_models.clip", "import transformers\nfrom mlcm_rl.rewards import Reward", True),
        ("reward_models.clip", "from mlcm_rl import rewards", True),
        ("reward_models.clip", "from mlcm_rl.models.teachers import load", False),
        ("reward_models.clip", "import mlcm_rl", False),
    ],
)
def test_a_wrong_arrow_is_seen(module, source, allowed):
    assert (rules.wrong_arrows(source, module) == []) is allowed


def test_code_in_a_package_is_seen():
    assert rules.code_in_package('"""What it is."""\n\nfrom .run import run\n\n__all__ = ["run"]\n') == []
    assert rules.code_in_package("LIMIT = 3") == ["line 1: LIMIT = 3"]
    assert rules.code_in_package("def run():\n    pass") == ["line 1: def run():"]


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import torch\ntorch.load(path, weights_only=True)", True),
        ("import torch\ntorch.load(path)", False),
        ("import torch\ntorch.load(path, weights_only=False)", False),
        ("from torch import load", False),
        ("import pickle", False),
        ("from pickle import loads", False),
        ("numpy.load(path, allow_pickle=True)", False),
        ("numpy.load(path, allow_pickle=False)", True),
        ("from safetensors.torch import load_file", True),
        ("import joblib", False),
        ("import yaml", False),
        ("from ruamel.yaml import YAML", True),
        ("eval(text)", False),
        ("model.eval()", True),
        ("exec(compile(text, 'x', 'exec'))", False),
        ("os.system(text)", False),
        ("torch.jit.load(path)", False),
        ("from torch.jit import load", False),
        ("Model.from_pretrained(path, trust_remote_code=True)", False),
        ("Model.from_pretrained(path, trust_remote_code=trusted)", False),
        ("Model.from_pretrained(path, trust_remote_code=False)", True),
        ("Model.from_pretrained(path, **{'trust_remote_code': True})", False),
        ("Model.from_pretrained(path, use_safetensors=None)", False),
        ("subprocess.run(line, shell=True)", False),
        ("subprocess.run([line], shell=False)", True),
        ("tar.extractall(folder)", False),
        ("tar.extractall(folder, filter='data')", True),
        ("archive.extract(name, folder)", False),
        ("extract(wheel, name, target)", True),
        ("shutil.unpack_archive(path)", False),
    ],
)
def test_unsafe_loading_is_seen(source, allowed):
    assert (rules.unsafe_loading(source) == []) is allowed


def test_a_late_package_is_seen():
    for first, late in (("import mlcm_rl", False), ("import mlcm_rl.rewards", False), ("import sources", True)):
        wrong = rules.late_package(f"{first}\nimport torch\nfrom diffusers import AutoencoderKL\nimport mlcm_rl\n")
        assert wrong == ["line 3: mlcm_rl is imported after diffusers, or not at all"] * late
    assert rules.late_package("def f():\n    import diffusers\n") == []


def test_length_is_seen():
    assert rules.too_long("x = 1\n" * 450) == []
    assert len(rules.too_long("x = 1\n" * 451)) == 1
    assert rules.too_long("def f():\n" + "    x = 1\n" * 119) == []
    assert "121 lines" in rules.too_long("def f():\n" + "    x = 1\n" * 120)[0]


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("path.read_text()", False),
        ("path.read_text('utf-8')", True),
        ("path.read_text(encoding='utf-8', errors='replace')", True),
        ("path.write_text(text)", False),
        ("path.write_text(text, 'utf-8')", True),
        ("path.open()", False),
        ("path.open('w', newline='')", False),
        ("path.open('rb')", True),
        ("path.open('w', encoding='utf-8')", True),
        ("open(path)", False),
        ("open(path, 'wb')", True),
        ("open(path, mode='a')", False),
        ("Image.open(path)", True),
        ("subprocess.run(command, text=True)", False),
        ("subprocess.run(command, text=True, encoding='utf-8')", True),
        ("subprocess.run(command)", True),
    ],
)
def test_text_in_the_locales_encoding_is_seen(source, allowed):
    assert (rules.locale_bound(source) == []) is allowed


def test_a_number_of_the_time_axis_is_seen():
    for source in ("t = 999", "milestones(8)", "def f(num_times=1000): ...", "x = t / 1000", "top: int = 999"):
        assert rules.unnamed_times(source)
    clean = 'NUM_RESAMPLES = 1000\ngrey = value >> 8\nx = 8.0\n"""999 to 0."""\ny = 80 + len(x)\n'
    assert rules.unnamed_times(clean) == []


def test_vague_names_are_seen():
    clean = "from diffusers.utils import logging\nclass Runtime:\n    def commonly_used(self): ...\n"
    assert rules.vague_names(clean, "mlcm_rl/training/loop.py") == []
    assert len(rules.vague_names("x = 1", "mlcm_rl/image_utils.py")) == 1
    assert len(rules.vague_names("x = 1", "mlcm_rl/common/solver.py")) == 1
    assert len(rules.vague_names("class ModelManager: ...\ndef load_helper(): ...", "mlcm_rl/models.py")) == 2


@pytest.mark.parametrize("form", ["{}", "{}.seed", "f(x={})", "def f({}): ...", "import a as {}", "x.{}", "f({}=1)"])
def test_the_banned_word_is_seen(form):
    for name in (rules.BANNED_WORD, f"do_{rules.BANNED_WORD}", rules.BANNED_WORD.upper()):
        assert rules.banned_word(form.format(name))
    assert rules.banned_word(form.format("recipe")) == []
    assert rules.banned_word(form.format("config")) == []


@pytest.mark.parametrize(
    "source",
    [
        "class Net(nn.Module): ...",
        "class Net(torch.nn.Module): ...",
        "print(1)",
        "with open(path) as file: ...",
        "x.to('cuda')",
        "torch.device('cuda:0')",
        "noise = torch.randn(3)",
        "noise = torch.randn_like(x)",
    ],
)
def test_an_impure_equation_is_seen(source):
    assert rules.impure(source)
    assert rules.impure('"""Runs on cpu and cuda."""\nnoise = torch.randn(3, generator=g)') == []


def test_machine_bound_text_is_seen():
    folder, host = "/" + "wo" + "rk/main", "https://py" + "pi.org/simple"
    for line in (folder, f"path: {folder}/x", f"'{folder}'", f"file://{folder}", "/" + "tmp/x", host, f"pip -i {host}"):
        assert rules.machine_bound(f"fine\n{line}\n")[0].startswith("line 2")
    for line in (
        "mlcm_rl/bases",
        "https://example.com/" + "wo" + "rk/x",
        "./" + "tmp/x",
        "frame" + "wo" + "rk/x",
        "$X/y",
    ):
        assert rules.machine_bound(line) == []


def test_a_pin_below_its_floor_is_seen():
    pins = "torch==2.13.0\nruamel-yaml==0.18.10  # YAML 1.2\n# numpy==1.0\nnumpy==1.26 ; python_version > '3'\n"
    assert rules.broken_floors(["torch>=2.11", "ruamel.yaml>=0.18"], pins) == []
    assert rules.broken_floors(["torch>=2.14"], pins) == ["torch>=2.14 is not satisfied by the pin 2.13.0"]
    assert rules.broken_floors(["numpy>=2.0", "peft>=0.21"], pins) == [
        "numpy>=2.0 is not satisfied by the pin 1.26",
        "peft>=0.21 is not pinned",
    ]


def test_tests_that_mirror_nothing_are_seen():
    tests = [f"{name}/test_{name}.py" for name in [*rules.ORDER, "parity"]]
    assert rules.unmirrored(tests) == []
    assert rules.unmirrored(tests[1:]) == ["mlcm_rl/cli has no folder of tests"]
    assert rules.unmirrored([*tests, "bases/test_bases.py"]) == ["tests/bases mirrors no package"]
    assert rules.unmirrored([*tests, "test_tiny.py"]) == ["tests/test_tiny.py lies in no folder"]
    assert rules.unmirrored([*tests, "faults/test_data.py"]) == ["2 files of tests are named test_data.py"]
