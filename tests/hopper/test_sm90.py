"""The CUDA kernel on an emulated Hopper: from its source everywhere, from nvcc's PTX where nvcc is."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from tests.hopper import emulator, mutations, sm90
from tests.hopper.mutations import Mutation

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")

PROBLEMS, PROBLEMS_FROM_PTX, PROBLEMS_OF_A_MUTATION = 200, 40, 60


@pytest.fixture(scope="module")
def nvcc() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")


def first_failure(library: ctypes.CDLL, problems: int) -> str | None:
    for seed in range(problems):
        what, wrong = sm90.random_block(library, seed, sm90.KINDS)
        if wrong is not None:
            return f"{what}: {wrong}"
    return None


def test_from_source() -> None:
    assert first_failure(sm90.from_source(), PROBLEMS) is None
    assert emulator.runtime().hopper_stmatrix_conflicts() == 0


def test_from_ptx(nvcc: None) -> None:
    assert first_failure(sm90.from_ptx(), PROBLEMS_FROM_PTX) is None


@pytest.mark.parametrize("mutation", mutations.KERNEL, ids=str)
def test_mutations_of_the_source(mutation: Mutation) -> None:
    assert first_failure(sm90.from_source(mutation), PROBLEMS_OF_A_MUTATION) is not None


@pytest.mark.parametrize("mutation", mutations.PTX, ids=str)
def test_mutations_of_the_ptx(mutation: Mutation, nvcc: None) -> None:
    assert first_failure(sm90.from_ptx(mutation), PROBLEMS_OF_A_MUTATION) is not None
