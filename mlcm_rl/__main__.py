"""`python -m mlcm_rl`: the command line."""

import os

# Before torch is imported: its threads wait asleep for one another, and do not spin on cores that other work needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
