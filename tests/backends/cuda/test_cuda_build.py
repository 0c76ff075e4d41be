"""The CUDA backend's NVRTC, driver and cache: what is compiled, kept, loaded and launched, and the reasons why not."""

from __future__ import annotations

import ctypes
import functools
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from siglip_kernels.__main__ import main
from siglip_kernels.backends import cuda
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.cuda import CudaBlockKernel, driver, kernels, nvrtc
from siglip_kernels.backends.cuda.driver import DriverError
from siglip_kernels.backends.cuda.nvrtc import CompileError

PLAIN = kernels.EVERY[0]
ON_CUDA = Problem(4096, 4096, 768, torch.bfloat16, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test finds what another has, nor leaves what it found."""
    for module, name in (
        *((nvrtc, name) for name in ("load", "why_not", "version")),
        *((driver, name) for name in ("load", "version")),
        *((kernels, name) for name in ("_sources", "load_kernel", "_multiprocessors")),
        (cuda, "_why_not_run"),
        (cuda, "_why_not_device"),
    ):
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(driver, "tensor_map", functools.lru_cache(64)(driver.tensor_map.__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ca che"))


@pytest.fixture
def real_nvrtc() -> None:
    if reason := nvrtc.why_not():
        pytest.skip(reason)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options of each compilation; instead of NVRTC."""
    seen: list[list[str]] = []

    def compile_file(path: Path, options: list[str]) -> bytes:
        seen.append(options)
        return b"code \0" + "".join(options).encode()

    monkeypatch.setattr(nvrtc, "compile_file", compile_file)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return seen


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "ca che" / "siglip_kernels" / "cuda").iterdir())


# ---- NVRTC ----


@pytest.mark.usefixtures("real_nvrtc")
def test_errors_name_file_and_line(tmp_path: Path) -> None:
    source = tmp_path / "bro ken.cu"
    source.write_text('#include "header.h"\n__global__ void kernel() { nonsense; }\n')
    (tmp_path / "header.h").write_text("// beside it\n")
    with pytest.raises(CompileError, match=r'NVRTC \d+\.\d+: .*bro ken\.cu\(2\): error: identifier "nonsense"'):
        nvrtc.compile_file(source, ["-arch=sm_90a"])
    with pytest.raises(CompileError, match=r"NVRTC \d+\.\d+: .*invalid value for --gpu-architecture"):
        nvrtc.compile_file(source, ["-arch=sm_4"])


@pytest.mark.usefixtures("real_nvrtc")
def test_the_kernel_asserts_what_the_launcher_takes_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TILE", "PARTIALS", "THREADS", "SHARED_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, getattr(kernels, name) + 1)
            with pytest.raises(CompileError, match="static assertion failed"):
                nvrtc.compile_file(kernels.SOURCE, kernels.options(PLAIN))


@pytest.mark.usefixtures("real_nvrtc")
def test_machine_code_is_elf_with_the_kernel() -> None:
    code = kernels.machine_code(PLAIN)
    assert code.startswith(b"\x7fELF")
    assert kernels.NAME.encode() in code


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for the only NVRTC that can be found."""
    monkeypatch.setattr(nvrtc, "_wheels", lambda: [tmp_path])
    monkeypatch.setattr(nvrtc, "TOOLKITS", ())
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def loaded(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    return tmp_path


def test_without_nvrtc(no_nvrtc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = nvrtc.why_not()
    assert reason is not None
    assert reason.startswith("no NVRTC to compile it with: pip install nvidia-cuda-nvrtc; libnvrtc.so.1")
    assert reason in CudaBlockKernel().why_not(ON_CUDA)
    assert CudaBlockKernel().prepare() == [reason]
    main(["info"])
    assert f"cuda    unavailable: features are on cpu, expected a CUDA device; {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(("torchs", "first"), [("12.8", "12"), ("13.0", "13"), (None, "13")])
def test_the_nvrtc_of_torch_is_taken(
    torchs: str | None, first: str, no_nvrtc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, major in (("cuda_nvrtc", "12"), ("cu13", "13")):
        (no_nvrtc / folder / "lib").mkdir(parents=True)
        (no_nvrtc / folder / "lib" / f"libnvrtc.so.{major}").touch()
        (no_nvrtc / folder / "lib" / f"libnvrtc-builtins.so.{major}.0").touch()
    asked: list[str] = []

    def loaded(path: str) -> Mock:
        asked.append(path)
        return Mock()

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    nvrtc.load()
    assert [Path(path).name for path in asked] == [f"libnvrtc-builtins.so.{first}.0", f"libnvrtc.so.{first}"]


# ---- the cache ----


def test_a_kernel_is_compiled_once(compiled: list[list[str]], tmp_path: Path) -> None:
    code = kernels.machine_code(PLAIN)
    assert kernels.machine_code(PLAIN) == code
    assert len(compiled) == 1
    (path,) = cached(tmp_path)
    assert path.suffix == ".cubin"
    path.write_bytes(code[:5])
    assert kernels.machine_code(PLAIN) == code, "a truncated file counts as absent"
    assert len(cached(tmp_path)) == 1
    assert len(compiled) == 2


@pytest.mark.parametrize("change", ["version", "sources", "compilation"])
def test_what_a_kernel_depends_on_compiles_it_anew(
    change: str, compiled: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.machine_code(PLAIN)
    if change == "version":
        monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    if change == "sources":
        monkeypatch.setattr(kernels, "_sources", lambda: [("kernel.cu", "")])
    kernels.machine_code(kernels.EVERY[1] if change == "compilation" else PLAIN)
    assert len(compiled) == len(cached(tmp_path)) == 2


def test_no_cache_is_needed(compiled: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert kernels.machine_code(PLAIN).startswith(b"code")


def test_every_source_counts() -> None:
    names = {name for name, _ in kernels._sources()}
    assert {path.name for kind in ("*.h", "*.cuh", "*.cu") for path in kernels.SOURCE.parent.glob(kind)} == names


def test_the_command_compiles_every_kernel(
    compiled: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("siglip_kernels.targets.TARGETS", {})
    monkeypatch.setattr(nvrtc, "why_not", lambda: None)
    assert main(["build"]) == 0
    assert len({tuple(options) for options in compiled}) == len(compiled) == len(kernels.EVERY) == 22
    assert capsys.readouterr().out.startswith("cuda: 22 kernels built in ")

    def fail(*arguments: Any) -> bytes:
        raise CompileError("NVRTC 13.1: nonsense")

    monkeypatch.setattr(nvrtc, "compile_file", fail)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    assert main(["build"]) == 1
    assert capsys.readouterr().out == "cuda: failed: NVRTC 13.1: nonsense\n"


# ---- the driver ----


class FakeDriver:
    """libcuda with one device; records its calls. ``errors``: what a call returns."""

    def __init__(self, version: int = 13000, has_context: bool = True, **errors: int) -> None:
        self.number, self.has_context, self.errors = version, has_context, errors
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuDriverGetVersion":
                arguments[0]._obj.value = self.number
            if name == "cuCtxGetCurrent" and self.has_context:
                arguments[0]._obj.value = 1
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no kernel image is available for execution on the device"
            if name == "cuCtxSetCurrent":
                self.has_context = True
            invalid = name == "cuLaunchKernel" and not self.has_context
            return 201 if invalid else self.errors.get(name, 0)

        return call


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(fake: FakeDriver) -> FakeDriver:
        monkeypatch.setattr(driver, "load", lambda: fake)
        return fake

    return use


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch, compiled: list[list[str]]) -> None:
    def missing(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    expected = "no driver for CUDA 12 or later: libcuda.so.1: cannot open shared object file"
    assert CudaBlockKernel().prepare() == [expected]


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: types.SimpleNamespace())
    with pytest.raises(DriverError, match=r"no driver for CUDA 12 or later: .*cuTensorMapEncodeTiled"):
        driver.load()


@pytest.mark.parametrize(
    ("of_driver", "of_nvrtc", "reasons"),
    [
        (13000, (13, 0), []),
        (12020, (12, 8), []),  # of one major version an older driver serves: only it can tell
        (13000, (12, 8), []),
        (12040, (13, 1), ["the driver is for CUDA 12.4, NVRTC of CUDA 13.1"]),
    ],
)
def test_the_driver_is_asked_for_its_version(
    of_driver: int, of_nvrtc: tuple[int, int], reasons: list[str], use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(FakeDriver(of_driver))
    monkeypatch.setattr(nvrtc, "version", lambda: of_nvrtc)
    assert CudaBlockKernel().prepare() == CudaBlockKernel().prepare() == reasons
    assert fake.calls == ["cuDriverGetVersion"]


def test_a_kernel_is_loaded_once_for_a_device(compiled: list[list[str]], use: Any) -> None:
    fake = use(FakeDriver())
    first = kernels.load_kernel(PLAIN, 0)
    assert kernels.load_kernel(PLAIN, 0) is first
    assert fake.calls == ["cuCtxGetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
    assert kernels.load_kernel(PLAIN, 1) is not first
    assert len(compiled) == 1


def test_what_the_driver_refuses_is_said(compiled: list[list[str]], use: Any) -> None:
    use(FakeDriver(cuModuleLoadData=209))
    with pytest.raises(DriverError, match="cuModuleLoadData: no kernel image is available"):
        kernels.load_kernel(PLAIN, 0)


def test_a_new_thread_gets_torchs_context(use: Any) -> None:
    fake = use(FakeDriver(has_context=False))
    for _ in range(2):
        driver.launch(ctypes.c_void_p(1), 1, 32, 0, [], 0, 0)
    context = ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert fake.calls == ["cuLaunchKernel", *context, "cuLaunchKernel", "cuLaunchKernel"]


def test_tensor_maps_are_kept(use: Any) -> None:
    fake = use(FakeDriver())
    arguments = torch.bfloat16, 4096, 300, 40, 40, (128, 64)
    first = driver.tensor_map(*arguments)
    assert ctypes.addressof(first) % 64 == 0
    assert driver.tensor_map(*arguments) is first
    assert driver.tensor_map(torch.bfloat16, 8192, *arguments[2:]) is not first
    assert fake.calls == ["cuTensorMapEncodeTiled"] * 2
