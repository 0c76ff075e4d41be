"""``python -m siglip_kernels``: what it prints, and that its exit code tells a wrong kernel from a right one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import siglip_kernels
from siglip_kernels import backends, build, console, targets, testing
from siglip_kernels.__main__ import main
from siglip_kernels.backends.base import BlockKernel, BlockTask, Problem
from siglip_kernels.backends.eager import EagerBlockKernel

ROOT = Path(siglip_kernels.__file__).parents[1]


def is_here(name: str) -> bool:
    with contextlib.suppress(Exception):
        return torch.zeros(1, device=name).item() == 0
    return False


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where Triton is not interpreted."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "siglip_kernels", *arguments],
        # One thread: several wait for each other, spinning, on a busy machine.
        env={**settings, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_info() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    for words in (siglip_kernels.__version__, torch.__version__, "cpu: ", "threads"):
        assert words in done.stdout, done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == {"eager", "cpu", "triton", "cuda"}, done.stdout
    assert "available" in lines["eager"]
    for line in lines.values():
        _, separator, reason = line.partition("unavailable: ")
        assert not separator or len(reason) > 10, f"no reason is given: {line}"


def test_check_of_a_right_backend() -> None:
    done = command("check", "--quick", "--backend", "eager", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eager on cpu" in done.stdout
    assert ": ok" in done.stdout
    assert "FAILED" not in done.stdout
    for words in ("loss", "dx", "dy", "dscale", "dbias", *testing.REGIMES, "float64", "float32", "bfloat16", "float16"):
        assert words in done.stdout, (words, done.stdout)
    assert "1 backend checked, 0 failed" in done.stdout


class Broken(EagerBlockKernel):
    """Forgets the last image of every block, as a wrong mask would."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.dz is not None:
            task.dz[-1] = 0


class Unable(EagerBlockKernel):
    def why_not(self, problem: Problem) -> list[str]:
        return ["the moon is not full", f"D = {problem.D}"]


@pytest.fixture
def one_small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd in all three sides, so that the exit code is told quickly."""
    monkeypatch.setattr("siglip_kernels.__main__.QUICK_SHAPES", ((7, 9, 5),))


@pytest.mark.usefixtures("one_small_shape")
def test_check_exits_1_when_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", "--quick", "--backend", "eager", "--device", "cpu"]
    assert main(arguments) == 0
    assert "1 backend checked, 0 failed" in capsys.readouterr().out
    monkeypatch.setitem(backends.BACKENDS, "eager", Broken())
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "1 backend checked, 1 failed" in printed
    # The shape, the regime and the worst coordinate of each failure.
    assert "FAILED float32 M=7 N=9 D=5 init diagonal: dx" in printed
    assert "at [6, " in printed


@pytest.mark.usefixtures("one_small_shape")
def test_check_says_why_a_backend_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing checked is no success."""
    monkeypatch.setitem(backends.BACKENDS, "eager", Unable())
    assert main(["check", "--quick", "--backend", "eager", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "the moon is not full; D = 768" in printed
    assert "0 backends checked" in printed


# Kinds of device that torch knows and few have; each is refused by an error of another type.
NOWHERE = [name for name in ("mps", "xpu", "hpu", "xla", "lazy", "cuda:99") if not is_here(name)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "command"),
        (["measure"], "measure"),
        (["check", "--backend", "cudnn"], "cudnn"),
        (["check", "--device", "toaster"], "toaster"),
        (["check", "--device", ""], "''"),
        (["check", "--device", "meta"], "no device 'meta' here: "),
        *((["check", "--device", name], f"no device {name!r} here: ") for name in NOWHERE),
    ],
)
def test_bad_command_lines(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert max(map(len, printed.splitlines())) < 400


class Demanding(EagerBlockKernel):
    """Of one dtype, and without a device."""

    def why_not(self, problem: Problem) -> list[str]:
        return ["no such device"] + ["features are not bfloat16"] * (problem.dtype is not torch.bfloat16)


@pytest.mark.parametrize("arguments", [["info"], ["check", "--quick", "--backend", "eager", "--device", "cpu"]])
def test_reasons_are_those_of_the_machine(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that the sample's dtype is not the backend's."""
    monkeypatch.setitem(backends.BACKENDS, "eager", Demanding())
    main(arguments)
    printed = capsys.readouterr().out
    assert "no such device\n" in printed
    assert "bfloat16" not in printed


@pytest.mark.parametrize("built", [True, False])
def test_info_asks_what_is_built_whether_it_runs(
    built: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That needs no compiler; what is not built is not prepared."""
    target = targets.Target("of eager", ())
    monkeypatch.setitem(targets.TARGETS, "eager", target)
    monkeypatch.setattr(build, "is_built", lambda asked: built and asked is target)
    monkeypatch.setattr(BlockKernel, "prepare", lambda self: ["the driver is old"])
    main(["info"])
    assert ("  eager   unavailable: the driver is old\n" in capsys.readouterr().out) is built


TEXT = "M·N ± é 漢 × σ…"
# Of siglip_kernels.console alone, without torch, so that every case is quick.
CONSOLE = f"""
import argparse, sys
sys.path.insert(0, {str(Path(siglip_kernels.__file__).parent)!r})
import console
def main():
    parser = argparse.ArgumentParser(description={TEXT!a})
    parser.add_argument("--count", type=int, default=0)
    count = parser.parse_args().count
    print({TEXT!a}, file=sys.stderr)
    for i in range(count): print({TEXT!a})
    return 7
sys.exit(console.run(main))
"""


def in_shell(line: str, **environment: str) -> tuple[int, str, str]:
    """Exit status and output of the line, in which $run is the program above."""
    settings = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment, "program": CONSOLE, "python": sys.executable}
    line = line.replace("$run", '"$python" -c "$program"')
    done = subprocess.run(["bash", "-c", line], env=settings, capture_output=True, timeout=60)
    output, errors = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert "Traceback" not in errors, errors
    assert "Exception ignored" not in errors, errors
    return done.returncode, output, errors


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "M*N +- e \\u6f22 x sigma...\n"),
        ({"PYTHONIOENCODING": "ascii:replace"}, "M*N +- e \\u6f22 x sigma...\n"),
        ({"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "M*N +- e \\u6f22 x"),
        ({"PYTHONIOENCODING": "latin-1"}, "M·N ± é \\u6f22 × sigma...\n"),
        ({"PYTHONIOENCODING": "utf-8"}, f"{TEXT}\n".encode().decode("latin-1")),
    ],
)
def test_text_that_the_encoding_lacks_stays_readable(settings: dict[str, str], expected: str) -> None:
    status, output, errors = in_shell("$run --count 2", **settings)
    assert status == 7
    assert output.startswith(expected)
    assert output.count("\n") == 2
    assert errors.startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("$run --count 100000 | head -1 >&2; exit ${PIPESTATUS[0]}", 141),
        ("$run --count 1 | true; exit ${PIPESTATUS[0]}", 141),
        ("$run --help | true; exit ${PIPESTATUS[0]}", 141),
        ("$run --count 1 2>&1 >&3 3>&- | true; exit ${PIPESTATUS[0]}", 7),
        ("$run --count 1 >&-", 7),
        ("$run --count 1 2>&-", 7),
        ("$run --count 1 >&- 2>&-", 7),
        ("$run --count 1 <&- >&- 2>&-", 7),
        ("$run --count x >&- 2>&-", 2),
        ("$run --count x 2>/dev/full", 2),
        ("$run --count 1 2>/dev/full", 7),
        ("$run --count 0 >/dev/full", 7),
        ("$run --count 1 >/dev/full 2>&1", 1),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_are_closed_or_full(line: str, expected: int, unbuffered: str) -> None:
    """No traceback, and an exit status of its own only where output is lost."""
    status, _, errors = in_shell(f"exec 3>/dev/null; {line}", PYTHONUNBUFFERED=unbuffered)
    assert status == expected, errors


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--count 1", "--help"])
def test_output_that_is_lost_is_an_error(arguments: str, unbuffered: str) -> None:
    status, _, errors = in_shell(f"$run {arguments} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert status == 1
    assert errors.endswith("error: the output cannot be written: No space left on device\n")


def test_other_errors_are_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe of another process that breaks is no reader that went away."""

    def main() -> int:
        raise BrokenPipeError

    streams = sys.stdout, sys.stderr
    with pytest.raises(BrokenPipeError):
        console.run(main)
    assert (sys.stdout, sys.stderr) == streams


def test_an_interruption() -> None:
    program = "import signal, sys; from siglip_kernels import __main__, console; print('ready', flush=True);"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore it
    program += "sys.exit(console.run(lambda: __main__.main(['check', '--backend', 'eager'])))"
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert output + errors == ""


def test_the_commands_themselves() -> None:
    """ASCII, a reader that has seen enough, and a check with stderr closed."""
    small = "from siglip_kernels import __main__ as m, console; m.QUICK_SHAPES = ((7, 9, 5),); console.run(m.main)"
    line = f"""
        export PYTHONIOENCODING=ascii
        "$python" -m siglip_kernels doctor --help | grep -q 'nodes x GPUs' || exit 3
        PYTHONUNBUFFERED=1 "$python" -m siglip_kernels info | head -1 || exit 4
        "$python" -c "{small}" check --backend eager --device cpu --quick 2>&- || exit 5
    """
    status, output, errors = in_shell(line)
    assert (status, errors) == (0, "")
    assert output.endswith("1 backend checked, 0 failed\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Words and an exit code, not a traceback."""
    try:
        code = main(["check", "--quick", "--backend", "eager", "--device", "cuda"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    assert code != 0
    captured = capsys.readouterr()
    assert "cuda" in (captured.out + captured.err).lower()
