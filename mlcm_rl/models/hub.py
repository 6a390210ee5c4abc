"""Upload an exported folder to the hub, by huggingface_hub."""

from pathlib import Path
from shlex import quote

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..storage.untrusted import in_a_line

LOG_IN = "`hf auth login` takes one with write access, which you make in your settings there; HF_TOKEN does too"
UNAUTHORISED, FORBIDDEN = 401, 403  # HTTP's status codes


def refuse_name(repository: str) -> None:
    """Raise ValueError if `repository` is no name of one, with its owner."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no repository: {in_a_line(error)}") from error
    if "/" not in repository:
        raise ValueError(f"{repository!r} has no owner: write NAME/{repository}, with your name or an organisation's")


def push(folder: Path, repository: str, public: bool, api: HfApi | None = None) -> str:
    """Upload `folder` to the model `repository` by `api`, made if there is none, and return its address.

    A new repository is private unless `public`. Files that it had stay. Raise ValueError where a repository that is
    public was to be private, or where the hub refuses or cannot be reached; `folder` is complete all the same.
    """
    api = HfApi() if api is None else api
    private = "" if public else " --private"
    again = (
        f"{folder} is complete: when that is mended, `hf upload {repository} {quote(str(folder))} .{private}` sends it"
    )
    try:
        address = api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        if not public and not api.repo_info(repository, repo_type="model").private:
            raise ValueError(
                f"{repository} is there already and is public: nothing was sent. Say --public, or name another one. "
                f"{again}"
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="model", commit_message="A few-step student, by mlcm-rl"
        )
    except LocalTokenNotFoundError as error:
        raise ValueError(f"no token is on this machine: {LOG_IN}. {again}") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{repository}: {_reason(error)}. {again}") from error
    except (HTTPError, OSError) as error:  # without a network, or with HF_HUB_OFFLINE
        raise ValueError(
            f"the hub could not be reached: {in_a_line(error)}; look at the network, a proxy, HF_HUB_OFFLINE. {again}"
        ) from error
    return str(address)


def _reason(error: HfHubHTTPError) -> str:
    """Return what the hub's refusal means, and what to do."""
    status = error.response.status_code
    if status == UNAUTHORISED:
        return f"the hub knows no token of yours: {LOG_IN}"
    if status == FORBIDDEN:
        return (
            "your token may not write there: make one that may write to this owner's repositories, or name another "
            "owner, and log in with it (`hf auth login`)"
        )
    return f"the hub answers {status}: {in_a_line(error)}"
