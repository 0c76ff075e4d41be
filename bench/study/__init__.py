"""Sigmoid against softmax over batch sizes, on real images: an experiment, its statistics and its report."""
