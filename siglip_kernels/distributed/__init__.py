"""The loss over a process group: a rank keeps its images, and receives the texts of every rank.

A rank's loss pairs its own images with all ranks' texts, and is divided by its own batch as ``reduction`` says. Its
text gradient collects the contribution of every rank. This is open_clip's SigLipLoss; DDP then averages.

ring     Texts travel from rank to rank, followed by the sum of their gradients. Memory is a few local batches for any
         number of ranks. Transfers overlap with the block kernels. A mesh of nodes × GPUs has two rings: while texts go
         round a node, those of the next node are on their way, through every GPU's own network card.
gather   One all-gather of the texts, one reduce-scatter of their gradients: the fewest messages, for small worlds.
         Memory grows with the global batch.

Both begin with a handshake of all ranks: batches may differ in size. Gradients are formed in the forward pass. Backward
communicates nothing if the upstream gradient is the same on every rank.
"""

from siglip_kernels.distributed.exchange import Exchange

__all__ = ["Exchange"]
