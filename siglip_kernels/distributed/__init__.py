"""The loss over a process group: a rank owns its images, and the texts of every rank are brought to them.

A rank's loss is that of its own images against all ranks' texts, divided as ``reduction`` says by its own batch; its
text gradient collects the contribution of every rank. That is open_clip's SigLipLoss; DDP then averages.

ring     Texts travel from rank to rank, the sum of their gradients behind them. Memory is that of a few local batches,
         whatever the number of ranks, and transfers run beside the block kernels. Over a mesh of nodes × GPUs there are
         two rings: texts go round a node while the next node's are on their way, by every GPU's own network card.
gather   One all-gather of the texts, one reduce-scatter of their gradients: the fewest messages, for small worlds.
         Memory grows with the global batch.

Before either comes a handshake of all ranks: batches may differ in size. Gradients are formed in the forward pass, and
backward communicates nothing, given the same upstream gradient on every rank.
"""

from siglip_kernels.distributed.exchange import Exchange

__all__ = ["Exchange"]
