"""Runs a command line on streams of any kind: readable text in any encoding, and a telling exit status."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

# For encodings without these characters. Unicode itself decomposes … into ... and ² into 2.
ASCII = {
    "×": "x",
    "·": "*",
    "±": "+-",
    "−": "-",
    "–": "-",
    "⁄": "/",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "‖": "||",
    "σ": "sigma",
    "Σ": "sum",
    "Π": "prod",
    "μ": "u",
}
SIGINT_STATUS, SIGPIPE_STATUS = 130, 141  # what a shell reports after SIGINT and SIGPIPE


class OutputError(Exception):
    """Standard output cannot be written to; holds the OSError. It is no OSError itself: argparse would swallow that."""


class GuardedStream:
    """A standard stream. A failed write raises OutputError, or is ignored."""

    def __init__(self, stream: Any, ignore: bool = False) -> None:
        self._stream, self._ignore = stream, ignore

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if not self._ignore:
                raise OutputError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], int]) -> int:
    """``main``'s exit status; 130 after Ctrl-C, 141 if the reader has gone, 1 if the output is lost otherwise."""
    _open_streams()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = GuardedStream(sys.stdout), GuardedStream(sys.stderr, ignore=True)
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return SIGINT_STATUS
    except OutputError as error:
        (cause,) = error.args
        if isinstance(cause, BrokenPipeError):
            return SIGPIPE_STATUS
        print(f"error: the output cannot be written: {cause.strerror}", file=sys.stderr)
        return 1
    finally:
        sys.stdout, sys.stderr = streams
        _discard_unwritten()


def _open_streams() -> None:
    """Open closed streams on the null device, so that no other file gets their number. Let the rest encode any text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    codecs.register_error("siglip_kernels.ascii", _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="siglip_kernels.ascii")


def _discard_unwritten() -> None:
    """Drop unwritten output, which the interpreter would try to write again at exit, with an error message."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replacements in ASCII for the characters that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = unicodedata.normalize("NFKD", error.object[error.start : error.end])
    plain = "".join(ASCII.get(c, c) for c in text if not unicodedata.combining(c))
    return plain.encode("ascii", "backslashreplace").decode(), error.end
