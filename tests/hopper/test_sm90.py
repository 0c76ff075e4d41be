"""The CUDA kernel on an emulated Hopper: from its source everywhere, from nvcc's PTX where nvcc is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from siglip_kernels import backends, build, sigmoid_loss, targets
from siglip_kernels.testing import check
from tests.building import HOST_CXX
from tests.hopper import emulator, mutations, sm90
from tests.hopper.emulator import Settings
from tests.hopper.mutations import Mutation
from tests.hopper.problems import first_failure

pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

PROBLEMS, PROBLEMS_FROM_PTX, PROBLEMS_OF_A_MUTATION = range(200), range(30), range(120)


@pytest.fixture(scope="module")
def nvcc() -> None:
    if not build.has_compiler(targets.TARGETS["cuda"]):
        pytest.skip("no nvcc")


@pytest.mark.parametrize("configuration", sm90.CONFIGURATIONS)
def test_from_source(configuration: str) -> None:
    library = sm90.from_source(defines=sm90.CONFIGURATIONS[configuration])
    assert first_failure(sm90.random_blocks(library, PROBLEMS, sm90.kinds_of(configuration))) is None
    assert emulator.runtime().hopper_stmatrix_conflicts() == 0


def test_the_loss_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the public function: every kind of pairs, few pairs too, against float64 as on a GPU."""
    monkeypatch.setattr(backends.BACKENDS["cuda"], "why_not", lambda problem: [])
    monkeypatch.setattr(backends.BACKENDS["cuda"], "prepare", list)
    loss = partial(sigmoid_loss, backend="cuda")
    dtypes, shapes = [torch.bfloat16, torch.float16], [(16, 31, 40), (127, 129, 100), (300, 140, 64)]
    with sm90.emulated(sm90.from_source(), 3, Settings()):
        report = check(loss, dtypes=dtypes, shapes=shapes)
    assert report.ok, report


def test_from_ptx(nvcc: None) -> None:
    assert first_failure(sm90.random_blocks(sm90.from_ptx(), PROBLEMS_FROM_PTX, sm90.KINDS)) is None


@pytest.mark.parametrize("configuration", list(sm90.CONFIGURATIONS)[1:])
def test_configurations_from_ptx(configuration: str, nvcc: None) -> None:
    library = sm90.from_ptx(defines=sm90.CONFIGURATIONS[configuration], only_bfloat16=True, only=sm90.PLAIN)
    assert first_failure(sm90.random_blocks(library, PROBLEMS_FROM_PTX, sm90.PLAIN_KINDS)) is None


@pytest.mark.parametrize(
    ("mutation", "configuration"),
    [
        *((mutation, "128x128") for mutation in mutations.KERNEL),
        *((mutation, "128x128, multicast") for mutation in mutations.MULTICAST),
        *((mutation, "128x256") for mutation in mutations.COOPERATIVE),
    ],
    ids=str,
)
def test_mutations_of_the_source(mutation: Mutation, configuration: str) -> None:
    library = sm90.from_source(mutation, sm90.CONFIGURATIONS[configuration], only_bfloat16=True)
    assert first_failure(sm90.random_blocks(library, PROBLEMS_OF_A_MUTATION, sm90.MUTATED_KINDS)) is not None


@pytest.mark.parametrize("mutation", mutations.PTX, ids=str)
def test_mutations_of_the_ptx(mutation: Mutation, nvcc: None) -> None:
    library = sm90.from_ptx(mutation, only_bfloat16=True, only=sm90.PLAIN)
    assert first_failure(sm90.random_blocks(library, PROBLEMS_OF_A_MUTATION, sm90.PLAIN_KINDS)) is not None
