"""A user's program as a type checker sees it: what each public call returns, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

ROOT = Path(__file__).resolve().parents[1]
HEAD = """
from typing_extensions import assert_type
import torch
from torch import Tensor
from siglip_kernels import LogitStats, SigLipLoss, SigmoidLoss, SigmoidLossGrads
from siglip_kernels import accumulate, sigmoid_loss, sigmoid_loss_and_grads, testing
from siglip_kernels.distributed import Exchange
from siglip_kernels.reference import sigmoid_loss_reference

x, y, ids = torch.ones(4, 8), torch.ones(4, 8), torch.arange(4)


def encode(batch: Tensor) -> tuple[Tensor, Tensor, float]:
    return batch, batch, 10.0


def anything(flag: bool) -> None:
"""
RIGHT = """
    assert_type(sigmoid_loss(x, y, 10.0, -10.0), Tensor)
    assert_type(sigmoid_loss(x, y, torch.tensor(10.0)), Tensor)
    assert_type(sigmoid_loss(x, y, 10.0, image_ids=ids, text_ids=ids, multi_positive="weights"), Tensor)
    assert_type(sigmoid_loss(x, y, 10.0, reduction="mean", backend="eager", positive_offset=None), Tensor)
    assert_type(sigmoid_loss(x, y, 10.0, return_stats=True), tuple[Tensor, LogitStats])
    assert_type(sigmoid_loss(x, y, 10.0, return_stats=flag), Tensor | tuple[Tensor, LogitStats])
    assert_type(sigmoid_loss(x, y, 10.0, process_group=Exchange(algorithm="gather")), Tensor)
    assert_type(sigmoid_loss_and_grads(x, y, 10.0, -10.0), SigmoidLossGrads)
    assert_type(sigmoid_loss_and_grads(x, y, 10.0).logit_bias, Tensor | None)
    assert_type(sigmoid_loss_and_grads(x, y, 10.0, return_stats=True), tuple[SigmoidLossGrads, LogitStats])
    assert_type(SigmoidLoss(backend="cpu").forward(x, y, image_weights=x[0]), Tensor | tuple[Tensor, LogitStats])
    assert_type(SigmoidLoss(init_logit_bias=None, parameter_shape=(1,)).logit_scale, torch.nn.Parameter)
    assert_type(SigLipLoss(world_size=2, dist_impl="gather").forward(x, y, 10.0), Tensor | dict[str, Tensor])
    assert_type(accumulate([x, y], encode), Tensor)
    assert_type(accumulate([x, y], encode, return_stats=True, reduction="sum"), tuple[Tensor, LogitStats])
    assert_type(testing.check(sigmoid_loss, dtypes=[torch.float32]), testing.Report)
    sigmoid_loss_reference(x, y, 10.0).backward()
    sigmoid_loss(x, y, 10.0).backward()
"""
# Each with the argument that the message has to name.
WRONG = {
    'sigmoid_loss(x, y, 10.0, reduction="average")': "reduction",
    'sigmoid_loss(x, y, 10.0, backend="hip")': "backend",
    'sigmoid_loss(x, y, "10")': "logit_scale|incompatible type",
    "sigmoid_loss(x, y, 10.0, image_id=ids)": "image_id",
    "sigmoid_loss(x, y)": "logit_scale|No overload variant",
    'sigmoid_loss_and_grads(x, y, 10.0, anchors="both sides")': "anchors",
    'SigmoidLoss(reduction="average")': "reduction",
    "accumulate([x], encode, positive_offset=0.5)": "positive_offset",
    "sigmoid_loss(x, y, 10.0, return_stats=True).backward()": "backward",
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """mypy's own of one program: those of RIGHT, and of each line of WRONG."""
    program = tmp_path_factory.mktemp("types") / "program.py"
    lines = [*(HEAD + RIGHT).splitlines(), *(f"    {line}" for line in WRONG)]
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # The cache of `make lint`, where that ran.
    options = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    out, err, _ = api.run([*options, "--no-error-summary", "--hide-error-context", str(program)])
    assert not err, err
    of_line: list[list[str]] = [[] for _ in range(len(lines) + 1)]
    for message in out.splitlines():
        found = re.match(r".*program\.py:(\d+): ", message)
        assert found, message
        of_line[int(found[1])].append(message)
    first_wrong = len(lines) - len(WRONG) + 1
    right = "\n".join(message for found in of_line[:first_wrong] for message in found)
    return right, ["\n".join(found) for found in of_line[first_wrong:]]


def test_every_public_call_has_a_type(messages: tuple[str, list[str]]) -> None:
    right, _ = messages
    assert not right, right


def test_wrong_calls_are_refused(messages: tuple[str, list[str]]) -> None:
    for (call, name), message in zip(WRONG.items(), messages[1], strict=True):
        assert re.search(name, message), (call, message)
