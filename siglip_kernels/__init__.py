"""The SigLIP sigmoid loss as fused kernels for PyTorch: the loss and all its gradients, never holding the logits."""

from siglip_kernels import distributed, reference, testing
from siglip_kernels.accumulation import accumulate
from siglip_kernels.drop_in import DistillSigLipLoss, SigLipLoss
from siglip_kernels.loss import SigmoidLossGrads, sigmoid_loss, sigmoid_loss_and_grads, sigmoid_losses
from siglip_kernels.module import SigmoidLoss
from siglip_kernels.stats import LogitStats
from siglip_kernels.teachers import Teacher

__all__ = [
    "DistillSigLipLoss",
    "LogitStats",
    "SigLipLoss",
    "SigmoidLoss",
    "SigmoidLossGrads",
    "Teacher",
    "accumulate",
    "distributed",
    "reference",
    "sigmoid_loss",
    "sigmoid_loss_and_grads",
    "sigmoid_losses",
    "testing",
]
__version__ = "0.2.0"
