"""The stages: one readable loop each. They share formulas and parts, never each other."""
