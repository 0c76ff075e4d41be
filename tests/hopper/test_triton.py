"""Every shipped half-precision Triton kernel of a Hopper, from its PTX: the interpreter has bfloat16 wrong."""

from __future__ import annotations

import multiprocessing
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from siglip_kernels.backends.triton.configs import Variant
from tests.building import HOST_CXX
from tests.hopper import mutations, triton_kernel
from tests.hopper.mutations import PtxMutation

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

PROBLEMS, PROBLEMS_OF_A_MUTATION = range(3), range(12)
BARRIER = r"bar\.sync\s+0;"
MUTATED = next(
    variant
    for variant in triton_kernel.shipped()
    if (variant.dtype, variant.labels, variant.masses, variant.config.block_m) == (torch.bfloat16, "ids", "none", 64)
)


MUTATED_TAUGHT = next(
    variant
    for variant in triton_kernel.shipped()
    if variant.teacher and (variant.dtype, variant.labels, variant.config.block_m) == (torch.bfloat16, "offset", 64)
)


@pytest.fixture(scope="module")
def worker() -> Iterator[Executor]:
    """A process of its own: in this one Triton interprets."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("no Python.h, with which Triton compiles its launcher")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            executor.submit(int).result()  # starts it
            yield executor


@pytest.mark.parametrize("variant", triton_kernel.shipped(), ids=str)
def test_shipped_kernels(variant: Variant, worker: Executor) -> None:
    assert worker.submit(triton_kernel.first_failure_of, variant, PROBLEMS).result() is None


@pytest.mark.parametrize("mutation", mutations.TRITON, ids=str)
def test_mutations(mutation: PtxMutation, worker: Executor) -> None:
    assert worker.submit(triton_kernel.first_failure_of, MUTATED, PROBLEMS_OF_A_MUTATION, mutation).result() is not None


@pytest.mark.parametrize("mutation", mutations.TAUGHT, ids=str)
def test_mutations_with_a_teacher(mutation: PtxMutation, worker: Executor) -> None:
    failure = worker.submit(triton_kernel.first_failure_of, MUTATED_TAUGHT, PROBLEMS_OF_A_MUTATION, mutation)
    assert failure.result() is not None


def test_every_barrier_but_the_redundant_is_needed(worker: Executor) -> None:
    count = len(re.findall(BARRIER, worker.submit(triton_kernel.ptx_of, MUTATED).result()))
    assert count == 21
    failures = [
        worker.submit(triton_kernel.first_failure_of, MUTATED, PROBLEMS_OF_A_MUTATION, PtxMutation(BARRIER, "", index))
        for index in range(count)
    ]
    needless = [index for index, failure in enumerate(failures) if failure.result() is None]
    assert needless == list(mutations.REDUNDANT_BARRIERS)
