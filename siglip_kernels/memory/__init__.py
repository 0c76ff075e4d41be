"""How much memory the loss takes on a rank, and the batch that fits."""
