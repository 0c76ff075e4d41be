"""The namespace of the operators. A copy for the Hugging Face hub has another file here, with one of its own."""

from __future__ import annotations

import torch

ops = torch.ops.siglip_kernels


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"{ops.name}::{name}"
