"""The CUDA kernel on an emulated Hopper: from its source everywhere, from NVRTC's PTX where NVRTC is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from siglip_kernels import backends, sigmoid_loss
from siglip_kernels.backends.cuda import nvrtc
from siglip_kernels.testing import check
from tests.building import HOST_CXX
from tests.hopper import emulator, mutations, sm90
from tests.hopper.emulator import Settings
from tests.hopper.mutations import Mutation
from tests.hopper.problems import first_failure

pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

PROBLEMS, PROBLEMS_FROM_PTX, PROBLEMS_OF_A_MUTATION = range(200), range(30), range(240)


@pytest.fixture(scope="module")
def nvrtc_here() -> None:
    if why_not := nvrtc.why_not():
        pytest.skip(why_not)


def test_from_source() -> None:
    conflicts = emulator.runtime().hopper_stmatrix_conflicts()  # those of mutations before
    assert first_failure(sm90.random_blocks(sm90.from_source(), PROBLEMS, sm90.KINDS)) is None
    assert emulator.runtime().hopper_stmatrix_conflicts() == conflicts


def test_the_loss_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the public function: every kind of pairs, few pairs too, against float64 as on a GPU."""
    monkeypatch.setattr(backends.BACKENDS["cuda"], "why_not", lambda problem: [])
    monkeypatch.setattr(backends.BACKENDS["cuda"], "prepare", list)
    loss = partial(sigmoid_loss, backend="cuda")
    dtypes, shapes = [torch.bfloat16, torch.float16], [(16, 31, 40), (127, 129, 100), (300, 140, 64)]
    with sm90.emulated(sm90.from_source(), 3, Settings()):
        report = check(loss, dtypes=dtypes, shapes=shapes)
    assert report.ok, report


@pytest.mark.usefixtures("nvrtc_here")
def test_from_ptx() -> None:
    assert first_failure(sm90.random_blocks(sm90.from_ptx(), PROBLEMS_FROM_PTX, sm90.KINDS)) is None


@pytest.mark.parametrize("mutation", mutations.KERNEL, ids=str)
def test_mutations_of_the_source(mutation: Mutation) -> None:
    load = sm90.from_source(mutation)
    assert first_failure(sm90.random_blocks(load, PROBLEMS_OF_A_MUTATION, sm90.MUTATED_KINDS)) is not None


@pytest.mark.usefixtures("nvrtc_here")
@pytest.mark.parametrize("mutation", mutations.PTX, ids=str)
def test_mutations_of_the_ptx(mutation: Mutation) -> None:
    load = sm90.from_ptx(mutation)
    assert first_failure(sm90.random_blocks(load, PROBLEMS_OF_A_MUTATION, sm90.PLAIN_KINDS)) is not None
