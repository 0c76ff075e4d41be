"""One GPU in a few minutes: kernels compiled ahead, checks, ceilings, comparison; and a sweep of configurations."""
