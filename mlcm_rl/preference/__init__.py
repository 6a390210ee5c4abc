"""The student in its roles, its prompts and scores, the guard, ranked pairs."""
