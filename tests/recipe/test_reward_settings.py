"""Settings of rewards: compared with the file that defines the reward, which is not imported."""

import inspect

import pytest

from mlcm_rl.recipe import Reward, reward_package
from mlcm_rl.recipe.reward_settings import problems, settings_in
from mlcm_rl.recipe.tree import key_text

CODE = """
raise RuntimeError("imported")

class Order:
    def __init__(self, device, dtype, path: "Path", *, strength: float = 1.0, mode: Literal["a", "b"] = "a",
                 levels: list[int] | None = None, other: Path = None):
        ...

class _Part: ...
"""


@pytest.fixture
def order(tmp_path, monkeypatch):
    """A reward file in the working directory that cannot be imported."""
    (tmp_path / "reward_models").mkdir()
    (tmp_path / "reward_models" / "order.py").write_text(CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "reward_models" / "order.py"
    package = reward_package.package()
    package.__path__.remove(str(tmp_path / "reward_models"))


def found(**settings) -> list[tuple[str, str, str]]:
    key = ("stages", 2, "rewards", 0)
    lines = problems(key, Reward(name="order", settings={"path": "x", **settings}))
    return [(key_text(one.key), one.message, one.nearest) for one in lines]


def test_settings_that_fit_are_none_of_its_problems(order):
    assert found() == []
    assert found(strength=2, mode="b", levels=[1, 2], other={"what": "ever"}) == []
    assert found(levels=None) == []


@pytest.mark.parametrize(
    ("settings", "message", "nearest"),
    [
        ({"strenght": 2.0}, "unknown setting; its settings are path, strength, mode, levels, other", "strength"),
        ({"strength": "2"}, "expected a number, found '2'", ""),
        ({"strength": True}, "expected a number, found True", ""),
        ({"mode": "c"}, "expected one of 'a', 'b', found 'c'", ""),
        ({"levels": [1, "x"]}, "expected a list, each a whole number, or null, found [1, 'x']", ""),
    ],
)
def test_a_setting_that_does_not_fit_is_told_by_its_key(order, settings, message, nearest):
    (name,) = settings
    assert found(**settings) == [(f"stages[2].rewards[0].settings.{name}", f"order: {message}", nearest)]


def test_a_setting_without_a_default_must_be_there(order):
    (problem,) = problems((), Reward(name="order"))
    assert problem.key == ("settings", "path")
    assert problem.message == "order: missing; its settings are path, strength, mode, levels, other"


def test_a_file_that_is_no_python_is_told_with_its_line(order):
    order.write_text("class Order:\n    def __init__(self\n", encoding="utf-8")
    (problem,) = problems((), Reward(name="order"))
    assert problem.message.startswith("the file of order cannot be read: ")
    assert problem.message.endswith(f"({order}, line 2)")


@pytest.mark.parametrize("code", ["x = " + "-" * 200_000 + "1", "x = 1" + " + 1" * 100_000])
def test_a_file_that_the_parser_gives_up_on_is_refused(order, code):
    order.write_text(code, encoding="utf-8")
    (problem,) = problems((), Reward(name="order"))
    assert problem.message == f"the file of order cannot be read: it is nested too deeply ({order})"


def test_an_annotation_without_a_value_takes_any(order):
    order.write_text("class Order:\n    def __init__(self, device, dtype, path: Literal[()]): ...", encoding="utf-8")
    assert found() == []


def test_a_text_that_python_warns_of_is_read_without_a_word(order, recwarn):
    order.write_text("TEXT = '\\d'\n" + CODE, encoding="utf-8")
    assert found() == []
    assert not recwarn.list


@pytest.mark.parametrize(
    "code",
    [
        "class A: ...\nclass B: ...",
        "class A(Base): ...",
        "@dataclass\nclass A:\n    x: int",
        "class A:\n    def __init__(self, device, dtype, **settings): ...",
        "class A:\n    def __init__(self, *arguments): ...",
        "if True:\n    class A: ...",
        "class A(metaclass=Other):\n    def __init__(self, device, dtype, x): ...",
        "class A:\n    def __new__(cls, device, dtype, y): ...\n    def __init__(self, device, dtype, x): ...",
    ],
)
def test_what_the_file_does_not_say_plainly_is_left_to_the_run(code):
    assert settings_in(code.encode()) is None


def test_the_settings_of_every_shipped_reward_are_those_of_its_constructor():
    from mlcm_rl.rewards.finding import class_of, settings_of

    for path in sorted(reward_package.OURS.glob("[a-z]*.py")):
        settings, expected = settings_in(path.read_bytes()), settings_of(class_of(path.stem))
        assert settings is not None
        has_default = {name: one.default is not inspect.Parameter.empty for name, one in expected.items()}
        assert {name: one.has_default for name, one in settings.items()} == has_default


def test_a_recipe_with_a_wrong_setting_is_refused_at_its_line(broken):
    (problem,) = broken(("rewards: [colourfulness]", "rewards: [{name: colourfulness, settings: {level: 1}}]"))
    assert (problem.place.line, key_text(problem.key)) == (25, "stages[2].rewards[0].settings.level")
    assert problem.text.startswith("colourfulness: unknown setting; it takes no settings")
