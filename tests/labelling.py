"""Six pairs of pictures to be judged by hand, and the page that asks, served from a thread."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

import runs
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.preference import labels, ranking
from mlcm_rl.preference.labels import Choices
from mlcm_rl.recipe.languages import guess_language

PROMPTS = [Prompt(text, guess_language(text)) for text in runs.PROMPTS]
Opened = Callable[..., Choices]


@pytest.fixture(scope="session")
def opened() -> Opened:
    """The choices in a folder, as the command opens them."""

    def choices(out: Path, seed: int = 0, prompts: list[Prompt] = PROMPTS) -> Choices:
        return Choices(ranking.PairSettings("student", "prompts", ranking.BY_HAND, 2, 4, 1.0, 0.0, seed), prompts, out)

    return choices


@pytest.fixture
def choices(tmp_path, opened) -> Choices:
    """The red of a picture says whose it is: ten times the pair's number, and the sample's."""
    (tmp_path / "pictures").mkdir()
    for number in range(len(PROMPTS)):
        for index, name in enumerate(labels.sample_names(number)):
            Image.new("RGB", (8, 8), (10 * number + index, 0, 0)).save(tmp_path / name)
    return opened(tmp_path)


@dataclass
class Served:
    """A page's server. `stopped` is set when the person is done."""

    port: int
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def served(choices) -> Iterator[Served]:
    """The page of `choices`, which the test ends."""
    label_page = pytest.importorskip("mlcm_rl.cli.label_page", reason="the extra `label` is not installed")
    with label_page.listen(0) as listening:
        found = Served(listening.getsockname()[1])
        server = label_page.server(choices, found.stopped.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield found
        server.should_exit = True
        thread.join()
