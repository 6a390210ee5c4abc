"""The folders of what can be fetched or computed again, which may be deleted at any time."""

import os
from pathlib import Path


def cache_folder(part: str, variable: str = "") -> Path:
    """Return the folder of `part` of the cache: that of $`variable`, else one in $MLCM_RL_CACHE or ~/.cache/mlcm_rl.

    A user without a home folder, as containers run them, has it in the working folder, where their runs are too.
    """
    named = os.environ.get(variable) or f"{os.environ.get('MLCM_RL_CACHE') or '~/.cache/mlcm_rl'}/{part}"
    try:
        return Path(named).expanduser()
    except RuntimeError:  # no home folder
        return Path(".mlcm_rl_cache") / part
