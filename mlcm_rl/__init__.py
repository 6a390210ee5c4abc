"""mlcm_rl: from a latent text-to-image teacher to a 2-8-step student that people prefer."""

import logging
import os

__version__ = "0.1.0"

if os.name != "posix":  # folders are locked by fcntl, and a step that is interrupted is timed by SIGALRM
    raise ImportError(f"mlcm_rl runs on Linux and macOS, and this system is {os.name}; on Windows, run it in WSL")

# PEFT imports bitsandbytes where it is installed, which then warns of a package for products that nothing here takes.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
