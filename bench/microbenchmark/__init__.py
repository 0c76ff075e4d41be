"""The loss alone: ours, the floor and the baselines timed in turns in one process; results and reports."""
