"""The microbenchmark: ours beside the hardware's floor and the rivals, interleaved in one process."""
