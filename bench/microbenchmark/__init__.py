"""The loss alone: ours beside the floor and the baselines, timed in turns in one process; its results and reports."""
