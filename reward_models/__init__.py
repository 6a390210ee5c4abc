"""One file and one card a reward model; `mlcm_rl.rewards.find` imports the one that is named."""
