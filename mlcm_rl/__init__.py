"""mlcm_rl: from a latent text-to-image teacher to a 2-8-step student that people prefer."""

__version__ = "0.1.0"
