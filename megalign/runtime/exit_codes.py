"""Names the exit codes of jobs and tools, which launchers, schedulers and scripts read."""

DONE = 0
FAILED = 1
BAD_INPUT = 2  # the user's; the same command cannot succeed
STOPPED = 75  # by a signal or a time limit, after saving; the same command goes on
