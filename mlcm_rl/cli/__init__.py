"""The `mlcm` command: one file a group of commands, parsing and printing only."""
