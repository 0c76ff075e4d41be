"""The disassemblers that come with Triton, and what they print."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def nvidia_tool(name: str, *arguments: str) -> str:
    """What one of the disassemblers that come with Triton prints."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout


def sass_opcodes(sass: str) -> list[str]:
    """Of "  /*0a10*/  @!P0 HGMMA.64x128x16.F32 ...", HGMMA: without the predicate."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
