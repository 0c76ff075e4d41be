"""The kernels that ``python -m bench gpu`` compiles ahead are those that its launches ask for. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import checks, command, precompile
from bench.gpu.plan import Plan
from bench.gpu.session import Session
from bench.microbenchmark.problems import FORWARD, FROZEN, Problem
from bench.microbenchmark.results import Results
from bench.static import compilation, triton_report
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends import verification
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.backends.triton.configs import Variant
from tests.bench.gpu.faulty import launch_only

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
bf16 = torch.bfloat16
# Both tiles of every dtype, blocks off the diagonal, every mode.
PLAN = Plan(
    check_shapes=((127, 129, 100), (1024, 2048, 16)),
    overflow_batch=128,
    block_problems=(Problem(1536, 16, bf16),),
    workspace_mib=(0.5,),
    compared_problems=(Problem(256, 16, bf16), *(Problem(1536, 16, bf16, mode) for mode in (FORWARD, FROZEN))),
    largest_problem=Problem(1600, 16, bf16),
)
HOPPER = Variant("sm_90", bf16, configs.SMALL["sm_90", 2], use_tma=True, precision="ieee")


def as_on_a_gpu(function: str, tmp_path: Path) -> Any:
    """What ``function`` of this file prints, in a process without the interpreter and with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = [sys.executable, __file__, function]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_compiled_is_what_is_launched(tmp_path: Path) -> None:
    """By the keys of Triton's own just-in-time compiler, of the checks and timings themselves and of the list."""
    keys = as_on_a_gpu("keys", tmp_path)
    assert len(keys["ahead"]) > 40
    assert sorted(set(keys["asked"]) - set(keys["ahead"])) == []
    assert sorted(set(keys["ahead"]) - set(keys["asked"])) == []


def test_a_launch_finds_what_other_processes_compiled(tmp_path: Path) -> None:
    found = as_on_a_gpu("hits", tmp_path)
    assert found == {"failed": [], "hits": [True, True], "late": []}


def test_a_kernel_that_does_not_compile_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bad = Variant("sm_90", bf16, configs.Config(96, 64, 64, 4, 3), use_tma=True, precision="ieee")
    failed = compilation.compile_ahead([bad, HOPPER], 300, processes=2)
    assert len(failed) == 1
    assert "96" in failed[0]
    assert compilation.compile_ahead([HOPPER], 0.0) == [f"{HOPPER}: not done in time"]
    assert compilation.compile_ahead([], 1.0) == []


def test_the_first_dtype_comes_first() -> None:
    dtypes = torch.bfloat16, torch.float16, torch.float32
    found = [variant.dtype for variant in precompile.variants_of_plan("sm_90", PLAN, dtypes)]
    assert found == sorted(found, key=dtypes.index)
    assert set(found) == set(dtypes)


def test_the_command_compiles_before_it_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Variant] = []
    monkeypatch.setattr(command, "_is_selected", lambda backend, dtype, session: backend == "triton")
    monkeypatch.setattr(
        compilation, "compile_ahead", lambda variants, seconds: compiled.extend(variants) or ["no ptxas"]
    )
    monkeypatch.setattr(compilation, "record_cache_misses", lambda misses: None)
    session = Session(CPU, tmp_path, None, float("inf"), Results({}))
    command.compile_kernels(session, PLAN, command.DTYPES)
    assert compiled == precompile.variants_of_plan("sm_90", PLAN, command.DTYPES)
    assert session.failures == ["no ptxas"]
    assert not session.rejected  # the checks will tell


def test_a_disassembler_that_is_missing_is_not_the_kernel_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: str) -> str:
        raise FileNotFoundError("nvdisasm")

    monkeypatch.setattr(triton_report, "compile_variant", lambda variant: type("Compiled", (), {"asm": {"cubin": b""}}))
    monkeypatch.setattr(triton_report, "nvidia_tool", missing)
    row = triton_report._inspect(HOPPER)
    assert row.problems == [f"{triton_report.NO_FIGURES}: nvdisasm"]


def keys() -> dict[str, list[str]]:
    """As the compiler would be asked: by the list, and by every step of the command, whose launches do nothing."""
    from triton import knobs

    from siglip_kernels.backends.triton import launch

    found: set[str] = set()
    knobs.runtime.jit_cache_hook = lambda *, key, **others: found.add(key) or True
    compile_only()
    for variant in precompile.variants_of_plan("sm_90", PLAN, command.DTYPES):
        launch.compile_variant(variant)
    ahead = sorted(found)
    found.clear()
    run_everything()
    return {"ahead": ahead, "asked": sorted(found)}


def hits() -> dict[str, list[Any]]:
    """Two kernels compiled by other processes, then asked for by a call here."""
    from triton import knobs

    from siglip_kernels.backends.triton import kernels

    call = partial(sigmoid_loss, *testing.make_inputs(64, 64, 16, bf16), backend="triton")
    misses: list[str] = []
    failed = compilation.compile_ahead(precompile_of_calls(), 300, processes=2)
    compile_only()
    kernel, cache_hits = kernels._sigmoid_block_kernel, []
    run = kernel.run
    kernel.run = lambda *arguments, **how: run(*arguments, **{**how, "warmup": True})
    compilation.record_cache_misses(misses)
    note = knobs.compilation.listener

    def listen(**compiled: Any) -> None:
        cache_hits.append(compiled["cache_hit"])
        note(**compiled)

    knobs.compilation.listener = listen
    call()
    call(positive_offset=None)
    return {"failed": failed, "hits": cache_hits, "late": misses}


def precompile_of_calls() -> list[Variant]:
    wanted = precompile.NEEDS_GRAD[FORWARD]
    calls = [precompile.LossCall((64, 64, 16), bf16, {"positive_offset": offset}, wanted) for offset in (0, None)]
    return precompile.variants_of_calls("sm_90", calls)


def compile_only() -> None:
    """A Hopper for Triton's compiler, and CPU tensors as its tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    verification.errors_of_launch = launch_only
    driver.set_active(compilation.CompileOnlyDriver(GPUTarget("cuda", 90, 32)))
    TritonBlockKernel.why_not = lambda self, problem: []  # type: ignore[method-assign]
    for kernel in backends.BACKENDS.values():
        type(kernel).is_automatic = lambda self, problem: self.name == "triton"  # type: ignore[method-assign]


def run_everything() -> None:
    """Each step of the command, and those checks that only a GPU gets."""
    testing.judge = judge
    for name in ("synchronize", "set_sync_debug_mode", "current_stream"):
        setattr(torch.cuda, name, lambda *arguments: Stream())
    torch.cuda.Stream = torch.cuda.CUDAGraph = Stream  # type: ignore[misc, assignment]
    torch.cuda.stream = torch.cuda.graph = lambda *arguments: nullcontext()  # type: ignore[misc, assignment]
    session = Session(CPU, Path(os.environ["TRITON_CACHE_DIR"]) / "out", ["ours (triton)"], float("inf"), Results({}))
    command.run_checks(session, PLAN, command.DTYPES)
    for dtype in command.DTYPES:
        checks.cuda_graph_replay("triton", CPU, dtype, PLAN.check_shapes[1])
        checks.no_host_sync("triton", CPU, dtype)
    session.rejected.clear()  # nothing was computed
    command.measure_ceilings(session, PLAN)
    command.compare(session, PLAN)
    command.measure_largest(session, PLAN)


class Stream:
    """Of a GPU that is not there; and its graph."""

    def wait_stream(self, other: Any) -> None: ...
    def replay(self) -> None: ...


def judge(loss_fn: Any, case: testing.Case, device: Any) -> testing.Verdict:
    """Calls the loss as the checker does; nothing is computed that could be judged."""
    if case.regime == "init":
        arguments = testing.PAIRS[case.pairs](*case.shape[:2], device)
        testing.differentiate(loss_fn, testing.make_inputs(*case.shape, case.dtype, device=device), **arguments)
    zeros = dict.fromkeys(testing.COLUMNS, 0.0)
    return testing.Verdict(case, zeros, zeros, [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"keys": keys, "hits": hits}[sys.argv[1]]()))
