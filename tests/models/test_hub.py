"""Uploading an export: what the hub is asked, by a stand-in for its API, and what is said when it refuses."""

import inspect
import re
import shlex
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mlcm_rl.models import hub

REPOSITORY = "someone/apples"


class Hub:
    """Records calls; raises `error` at the call named `at`."""

    def __init__(self, private: bool = True, at: str = "", error: Exception | None = None):
        self.private, self.at, self.error = private, at, error
        self.calls: list[tuple[str, dict]] = []

    def _call(self, name: str, **arguments) -> None:
        self.calls.append((name, arguments))
        if name == self.at:
            raise self.error

    def create_repo(self, repo_id: str, **settings) -> str:
        self._call("create_repo", repo_id=repo_id, **settings)
        return f"the-hub/{repo_id}"

    def repo_info(self, repo_id: str, **settings) -> SimpleNamespace:
        self._call("repo_info", repo_id=repo_id, **settings)
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings) -> None:
        self._call("upload_folder", **settings)


def refusal(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} from the hub", response=response)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("A card.")
    return tmp_path


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_is_sent_to_a_repository_that_is_private_unless_it_is_to_be_public(public, folder):
    api = Hub()
    assert hub.push(folder, REPOSITORY, public, api) == "the-hub/someone/apples"
    made, *others, sent = api.calls
    assert made[1] == {"repo_id": REPOSITORY, "repo_type": "model", "private": not public, "exist_ok": True}
    assert [name for name, _ in others] == ([] if public else ["repo_info"])
    assert (sent[0], sent[1]["folder_path"], sent[1]["repo_id"]) == ("upload_folder", folder, REPOSITORY)


def test_the_calls_are_those_of_the_installed_api(folder):
    """The stand-in takes anything: here the real class binds the same arguments."""
    api = Hub()
    hub.push(folder, REPOSITORY, False, api)
    for name, arguments in api.calls:
        inspect.signature(getattr(HfApi, name)).bind(None, **arguments)


def test_a_public_repository_does_not_get_what_was_to_be_private(folder):
    api = Hub(private=False)
    with pytest.raises(
        ValueError, match=r"someone/apples is there already and is public: nothing was sent\. Say --public"
    ):
        hub.push(folder, REPOSITORY, False, api)
    assert [name for name, _ in api.calls] == ["create_repo", "repo_info"]


@pytest.mark.parametrize("at", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("none"), "no token is on this machine: `hf auth login`"),
        (refusal(401), "someone/apples: the hub knows no token of yours: `hf auth login`"),
        (refusal(403), "your token may not write there: make one that may write to this owner's repositories"),
        (refusal(500), "the hub answers 500: HfHubHTTPError: 500 from the hub"),
        (
            OfflineModeIsEnabled("offline mode"),
            "the hub could not be reached: OfflineModeIsEnabled: offline mode; look at the network",
        ),
        (HTTPError("no route to host"), "the hub could not be reached: HTTPError: no route to host"),
    ],
    ids=["no-token", "401", "403", "500", "offline", "no-network"],
)
def test_a_refusal_says_what_to_do_and_leaves_the_folder(at, error, said, folder):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        hub.push(folder, REPOSITORY, False, Hub(at=at, error=error))
    assert f"{folder} is complete: when that is mended, `hf upload {REPOSITORY} {folder} . --private`" in str(
        caught.value
    )
    assert (folder / "README.md").read_text() == "A card."


def test_the_command_that_sends_it_later_has_the_folder_in_quotes_where_it_needs_them(tmp_path):
    folder = tmp_path / "my 红苹果"
    folder.mkdir()
    with pytest.raises(ValueError) as caught:
        hub.push(folder, REPOSITORY, True, Hub(at="create_repo", error=refusal(403)))
    (command,) = re.findall(r"`(hf upload .*?)`", str(caught.value))
    assert shlex.split(command) == ["hf", "upload", REPOSITORY, str(folder), "."]


def test_without_a_network_the_real_api_is_refused_in_words(folder):
    """Tests run with HF_HUB_OFFLINE."""
    with pytest.raises(ValueError, match="the hub could not be reached"):
        hub.push(folder, REPOSITORY, True)


@pytest.mark.parametrize(
    ("name", "said"),
    [("apples", "has no owner: write NAME/apples"), ("a/b/c", "is no repository"), ("a/b..c", "is no repository")],
)
def test_a_name_is_checked_before_anything_is_exported(name, said):
    with pytest.raises(ValueError, match=said):
        hub.refuse_name(name)
