"""The C++ block kernel at every level of instructions that this machine has: against float64, and its own promises."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_kernels import backends, build, sigmoid_loss, sigmoid_loss_and_grads, targets
from siglip_kernels.backends import cpu
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.cpu import CpuBlockKernel
from siglip_kernels.backends.cpu_native import LEVELS, CpuLibrary, load
from siglip_kernels.pairs import PairSpec
from siglip_kernels.testing import DTYPES, PAIRS, SHAPES, check, differentiate, gold, make_inputs, relative_l2
from tests.building import HOST_CXX

CPU = torch.device("cpu")
MIB = 2**20
EVALUATE_FLOAT32, EVALUATE_FLOAT64 = 0, 1
EXP, LOG1P, TO_BFLOAT16, TO_FLOAT16 = range(4)


def plain_call(dtype: torch.dtype = torch.float32, B: int = 1024, D: int = 768) -> Problem:
    return Problem(B, B, D, dtype, CPU)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Each level; "amx" is MKL's product, which runs anywhere on x86, only slower."""
    native = load()
    if request.param != "amx" or isinstance(native, str):
        reasons = CpuBlockKernel(request.param).prepare()
        if reasons:
            pytest.skip("; ".join(reasons))
    elif torch.bfloat16 not in native.gemm:
        pytest.skip("this torch has no MKL")
    return str(request.param)


@pytest.fixture
def kernel(level: str, monkeypatch: pytest.MonkeyPatch) -> CpuBlockKernel:
    """The backend "cpu" at that level, in blocks of which the larger shapes take several a side."""
    kernel = CpuBlockKernel(level)
    monkeypatch.setattr(kernel, "prepare", list)  # MKL's product for AMX runs without it
    monkeypatch.setattr(kernel, "block_shape", lambda problem: (320, 512))
    monkeypatch.setitem(backends.BACKENDS, "cpu", kernel)
    return kernel


loss_fn = partial(sigmoid_loss, backend="cpu")


# The upper levels differ in nothing but their bfloat16 products.
GRADIENTS = [(level, dtype) for level in LEVELS for dtype in DTYPES if level in LEVELS[:3] or dtype is torch.bfloat16]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("level", "dtype"), GRADIENTS, indirect=["level"], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    report = check(loss_fn, dtypes=[dtype], shapes=(*SHAPES[:-1], (700, 1100, 64)))
    assert report.ok, report


# A D below one vector; an odd D in two passes over k; one image, one text; a last panel and a last tile of one.
RAGGED = [(70, 90, 3), (65, 130, 1701), (1, 300, 64), (300, 1, 64), (2000, 65, 48), (97, 577, 65)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes(shape: tuple[int, int, int]) -> None:
    report = check(loss_fn, dtypes=[torch.bfloat16, torch.float32], shapes=[shape], regimes=["init", "trained"])
    assert report.ok, report


@pytest.mark.usefixtures("kernel")
def test_every_subset_of_gradients() -> None:
    """What is not asked for changes nothing of what is."""
    inputs = make_inputs(130, 200, 96, torch.bfloat16)
    whole = sigmoid_loss_and_grads(*inputs, backend="cpu")
    for subset in range(16):
        leaves = [t.detach().clone().requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(inputs)]
        loss = loss_fn(*leaves)
        assert relative_l2(loss.detach(), whole.loss) < 1e-6
        if subset:
            loss.backward()
        for leaf, right in zip(leaves, whole[1:], strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            assert leaf.grad is None or relative_l2(leaf.grad, right) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_whatever_the_threads(kernel: CpuBlockKernel, dtype: torch.dtype) -> None:
    """Sums are added in the tasks' order. A library's products may depend on the number of threads."""
    inputs = make_inputs(900, 1100, 200, dtype)
    ours = kernel._gemm(dtype) == "ours"
    before = torch.get_num_threads()
    results: dict[int, list[Any]] = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = [sigmoid_loss_and_grads(*inputs, backend="cpu") for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for runs in [*results.values(), *([[r[0] for r in results.values()]] if ours else [])]:
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# One of the two alone, both, and the ends of their ranges.
BALANCES = [(3.0, 0.0), (1.0, 0.2), (0.25, 0.3), (0.0, 0.1), (2.0, 1.0)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("positive_weight", "label_smoothing"), BALANCES)
@pytest.mark.parametrize("kind", ["diagonal", "no positives", "weights", "ignore ids", "multi-positive weights"])
def test_balance(kind: str, positive_weight: float, label_smoothing: float) -> None:
    """With labels and masses that the checker has no balance for. Stats are of the logits, which it does not change."""
    pairs = PAIRS[kind](130, 203, CPU)
    inputs = make_inputs(130, 203, 33, torch.float32, positive_offset=pairs.get("positive_offset") or 0)
    balance = {"positive_weight": positive_weight, "label_smoothing": label_smoothing}
    got = differentiate(loss_fn, inputs, **pairs, **balance)
    right = gold(inputs, **pairs, **balance)
    assert all(relative_l2(a, b) < 2e-6 for a, b in zip(got, right, strict=True))
    loss, stats = loss_fn(*inputs, **pairs, **balance, return_stats=True)
    assert relative_l2(loss, got.loss) < 1e-7
    torch.testing.assert_close(stats, loss_fn(*inputs, **pairs, return_stats=True)[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pairs", [{}, {"positive_weight": 2.0, "label_smoothing": 0.1}], ids=["plain", "balance"])
def test_nan_and_inf_reach_the_loss(dtype: torch.dtype, value: float, pairs: dict[str, Any]) -> None:
    for row in (0, 77):
        inputs = make_inputs(130, 100, 33, dtype)
        inputs.image_features[row, 3] = value
        assert not torch.isfinite(loss_fn(*inputs, **pairs))
        assert not torch.isfinite(sigmoid_loss_and_grads(*inputs, **pairs, backend="cpu").text_features).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_strided_and_unaligned_features(dtype: torch.dtype) -> None:
    x, y, t, b = make_inputs(140, 150, 67, dtype)
    right = sigmoid_loss_and_grads(x[1:, 1:].clone(), y[3:, 1:].clone(), t, b, backend="cpu")
    strided = sigmoid_loss_and_grads(x[1:, 1:], y.T.contiguous().T[3:, 1:], t, b, backend="cpu")
    flat = torch.empty(139 * 66 + 1, dtype=dtype)[1:].view(139, 66).copy_(x[1:, 1:])  # off any alignment
    unaligned = sigmoid_loss_and_grads(flat, y[3:, 1:].clone(), t, b, backend="cpu")
    for got in (strided, unaligned):
        assert all(relative_l2(a, b) < 1e-5 for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.usefixtures("kernel")
def test_ids_of_any_integer_dtype(integers: torch.dtype) -> None:
    inputs = make_inputs(90, 110, 40, torch.float32)
    ids = {"image_ids": (torch.arange(90) % 7).to(integers), "text_ids": (torch.arange(220) % 5).to(integers)[::2]}
    assert relative_l2(loss_fn(*inputs, **ids), gold(inputs, **ids).loss) < 1e-6


def ulps(value: NDArray[Any], exact: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """Distance in units of the last place of the exact value's format."""
    spacing = np.spacing(np.abs(exact).astype(value.dtype)).astype(np.longdouble)
    return np.abs(value.astype(np.longdouble) - exact) / spacing


def evaluate(native: CpuLibrary, level: str, function: int, x: Tensor, out: Tensor) -> Tensor:
    wide = EVALUATE_FLOAT64 if x.dtype is torch.float64 else EVALUATE_FLOAT32
    native.evaluate(LEVELS.index(level), function, wide, x.data_ptr(), out.data_ptr(), x.numel())
    return out


def dense(dtype: torch.dtype, low: float, high: float) -> Tensor:
    """Evenly in value, and in the exponent; an odd number of them."""
    even = torch.linspace(low, high, 2_000_001, dtype=torch.float64)
    tiny = torch.logspace(-310 if dtype is torch.float64 else -45, 2, 400_000, dtype=torch.float64)
    signs = torch.cat([tiny, -tiny])
    return torch.cat([even, signs[(signs >= low) & (signs <= high)]]).to(dtype)


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@FLOATS
def test_exp_within_two_ulp(native: CpuLibrary, level: str, dtype: torch.dtype) -> None:
    x = dense(dtype, -104.5 if dtype is torch.float32 else -746.0, 0.0)
    got = evaluate(native, level, EXP, x, torch.empty_like(x))
    error = ulps(got.numpy(), np.exp(x.numpy().astype(np.longdouble)))
    assert error.max() < 2, (float(error.max()), x[int(error.argmax())])


@FLOATS
def test_log1p_within_two_ulp(native: CpuLibrary, level: str, dtype: torch.dtype) -> None:
    x = torch.cat([dense(dtype, 0.0, 2.0), dense(dtype, 0.0, 300.0), torch.logspace(0, 30, 99_999, dtype=dtype)])
    got = evaluate(native, level, LOG1P, x, torch.empty_like(x))
    error = ulps(got.numpy(), np.log1p(x.numpy().astype(np.longdouble)))
    assert error.max() < 2, (float(error.max()), x[int(error.argmax())])


@FLOATS
def test_exp_and_log1p_at_the_edges(native: CpuLibrary, level: str, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")

    def values(function: int, *x: float) -> list[float]:
        t = torch.tensor(x, dtype=dtype)
        return [float(v) for v in evaluate(native, level, function, t, torch.empty_like(t))]

    assert values(EXP, 0.0, -0.0, -inf, -1e30) == [1.0, 1.0, 0.0, 0.0]
    assert values(LOG1P, 0.0, inf) == [0.0, inf]
    assert np.isnan(values(EXP, nan) + values(LOG1P, nan)).all()


@FLOATS
def test_softplus_and_sigmoid_from_minus_to_plus_100(level: str, dtype: torch.dtype) -> None:
    """Each pair on its own, through the block: u = a at scale 1 and bias 0, and no positives."""
    kernel = CpuBlockKernel(level)
    u = torch.cat([torch.linspace(-100, 100, 4001, dtype=dtype), torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=dtype)])
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    softplus = np.logaddexp(0, u.numpy().astype(np.longdouble))
    dz = torch.empty(1, len(u), dtype=dtype)
    workspace = kernel.workspace(Problem(1, len(u), 1, dtype, CPU), 1, len(u))
    x, y, sums = one.view(1, 1), u.view(-1, 1), torch.empty(3, dtype=torch.float64)
    task = BlockTask(x, y, one, zero, PairSpec(None), sums, dz, dz_scale=None, workspace=workspace)
    kernel.block(task)
    exact = 1 / (1 + np.exp(-u.numpy().astype(np.longdouble)))
    assert ulps(dz[0].numpy(), exact).max() < 4
    loss = torch.empty(len(u), 3, dtype=torch.float64)
    for i in range(0, len(u), 5):
        at = u[i : i + 1].view(-1, 1)
        kernel.block(task._replace(y=at, sums=loss[i], dz=dz[:, :1]))
    assert ulps(loss[::5, 0].to(dtype).numpy(), softplus[::5]).max() < 3


@pytest.mark.parametrize(("function", "dtype"), [(TO_BFLOAT16, torch.bfloat16), (TO_FLOAT16, torch.float16)])
def test_rounding_is_torchs(native: CpuLibrary, level: str, function: int, dtype: torch.dtype) -> None:
    """To nearest even, with subnormals, overflow to inf, and NaN: on 4 million bit patterns and on every tie."""
    bits = torch.arange(-(2**31), 2**31, 1021, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16).view(dtype).float().view(torch.int32)
    ties = torch.cat([halves + d for d in (0, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    x = torch.cat([bits, ties]).view(torch.float32)
    got = evaluate(native, level, function, x, torch.empty(x.shape, dtype=dtype))
    right = x.to(dtype)
    same = (got.view(torch.int16) == right.view(torch.int16)) | (got.isnan() & right.isnan())
    assert same.all(), (x[~same][:3], got[~same][:3], right[~same][:3])


# The last but one packs its texts (in several pieces), the others need not.
STEPS = [(1, 1, 1), (7, 3, 65), (64, 64, 64), (67, 200, 1801), (1100, 70, 1040), (130, 255, 33)]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("r", "c", "D"), STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(level: str, dtype: torch.dtype, r: int, c: int, D: int, begun: bool) -> None:
    """A block and its gradients: never rounded on the way, from a padded dz and into rows of a larger result."""
    kernel, problem = CpuBlockKernel(level), plain_call(dtype, B=2048, D=D)
    x, y, scale, bias = make_inputs(r, c, D, kernel.operand_dtype(problem))
    dz = torch.empty(r, c + 13, dtype=x.dtype)[:, :c]
    dx, dy = (torch.randn(n + 2, D, dtype=torch.promote_types(x.dtype, torch.float32)) for n in (r, c))
    before = dx.clone(), dy.clone()
    sums, workspace = torch.empty(3, dtype=torch.float64), kernel.workspace(problem, r, c)
    scalars = scale.detach().to(dx.dtype), bias.detach().to(dx.dtype)
    task = BlockTask(x, y, *scalars, PairSpec(), sums, dz, dz_scale=None, workspace=workspace)
    grads: Any = {"dx": dx[1:-1], "accumulate_dx": begun, "dy": dy[1:-1], "accumulate_dy": begun}
    kernel.block_and_grads(task._replace(**grads))
    logits = scalars[0].double() * (x.double() @ y.double().T) + scalars[1].double()
    exact = logits.sigmoid() - torch.eye(r, c, dtype=torch.float64)
    assert relative_l2(dz, exact) < {torch.float64: 1e-13, torch.float32: 2e-6}.get(x.dtype, 3e-3)
    for got, start, product in ((dx, before[0], dz.double() @ y.double()), (dy, before[1], dz.double().T @ x.double())):
        assert relative_l2(got[1:-1], product + begun * start[1:-1].double()) < 1e-6
        assert torch.equal(got[:: len(got) - 1], start[:: len(got) - 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspace_is_bounded(level: str, dtype: torch.dtype) -> None:
    """The block's buffers, dz and widened blocks of features among them, whatever the batch."""
    kernel, problem = CpuBlockKernel(level), plain_call(dtype, B=32768)
    R, C = kernel.block_shape(problem)
    operand = kernel.operand_dtype(problem).itemsize
    widened = (R + C) * problem.D * operand if kernel.operand_dtype(problem) != dtype else 0
    buffers = sum(t.numel() * t.element_size() for t in kernel.workspace(problem, R, C) if t is not None)
    assert buffers + R * C * operand + widened <= 64 * MIB
    assert kernel.block_shape(plain_call(dtype, B=1 << 20)) == (R, C)


def test_workspace_is_on_the_cpu_whatever_the_default(level: str) -> None:
    kernel = CpuBlockKernel(level)
    with torch.device("meta"):
        for dtype in DTYPES:
            for buffer in kernel.workspace(plain_call(dtype)._replace(needs_dz=False), 64, 64):
                assert buffer is None or buffer.device == CPU


def test_features_elsewhere_are_a_reason() -> None:
    on_cuda = Problem(8, 8, 8, torch.float32, torch.device("cuda"))
    assert CpuBlockKernel().why_not(on_cuda) == ["features are on cuda, expected the CPU"]


def test_a_level_that_is_not_here_is_a_reason(native: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", LEVELS.index("avx2"))
    assert CpuBlockKernel("avx512").prepare() == ["this CPU's level is avx2, below avx512"]
    assert CpuBlockKernel("portable").prepare() == []


def test_no_library_is_a_reason_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", functools.cache(lambda: "no compiler was found"))
    for _ in range(2):
        assert backends.choose("auto", plain_call()).name == "eager"
        with pytest.raises(ValueError, match="no compiler was found"):
            sigmoid_loss(*make_inputs(4, 4, 8, torch.float32), backend="cpu")


def test_auto_takes_it(native: CpuLibrary) -> None:
    assert backends.choose("auto", plain_call()).name == "cpu"


def test_headers_are_named() -> None:
    """A change in any of them builds anew."""
    headers = {str(path.relative_to(build.CSRC)) for path in (build.CSRC / "cpu").glob("*.h")}
    assert headers == set(targets.TARGETS["cpu"].headers)


def starts(compiler: str, flags: list[str], folder: Path) -> bool:
    """Whether a program compiled with ``flags`` runs at all here."""
    source = folder / "trivial.cpp"
    source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    compiled = subprocess.run([compiler, *flags, str(source), "-o", str(folder / "trivial")], capture_output=True)
    return compiled.returncode == 0 and subprocess.run([folder / "trivial"], capture_output=True).returncode == 0


def cpp_tests(compiler: str, sources: Sequence[targets.Source], folder: Path, *flags: str) -> Path:
    """The program of the C++ tests, beside those ``sources`` of the library."""
    common = [*targets.TARGETS["cpu"].flags, "-O1", "-g1", *flags, "-c"]
    units = [*sources, targets.Source("cpu/tests/test_cpu.cpp")]
    objects = [str(folder / f"{index}.o") for index in range(len(units))]
    running = [
        subprocess.Popen([compiler, *common, *unit.flags, str(build.CSRC / unit.path), "-o", built])
        for unit, built in zip(units, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    subprocess.run([compiler, *flags, *objects, "-o", str(folder / "test")], check=True)
    return folder / "test"


def assert_ok(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_cpp(sanitizer: str, tmp_path: Path) -> None:
    """The C++ tests, under the sanitizers."""
    if HOST_CXX is None:
        pytest.skip("no C++ compiler")
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    if not starts(HOST_CXX, checks, tmp_path):
        pytest.skip(f"no {sanitizer} sanitizer here")
    # GCC compiles calls in 0.6 of the time of inline checks.
    calls = ["--param", "asan-instrumentation-with-call-threshold=0"]
    if starts(HOST_CXX, [*checks, *calls], tmp_path):
        checks += calls
    assert_ok(cpp_tests(HOST_CXX, targets.TARGETS["cpu"].sources, tmp_path, *checks))


def test_cpp_on_arm(tmp_path: Path) -> None:
    """The same on an emulated 64-bit Arm, which takes the portable path."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    assert_ok(emulator, cpp_tests(compiler, targets.CPU_PORTABLE_SOURCES, tmp_path, "-static", "-pthread"))
