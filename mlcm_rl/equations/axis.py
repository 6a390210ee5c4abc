"""The numbers of the time axis. Nothing here imports torch: recipes are checked by them."""

NUM_TIMES = 1000  # T
NUM_SEGMENTS = 8  # of the axis, whose ends are the milestones; a sampler has as many steps at most
MOST_SEGMENTS = 32  # of a student: its first phases may have more than a sampler has steps
