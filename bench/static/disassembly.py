"""The disassemblers that come with Triton."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def nvidia_tool(name: str, *arguments: str) -> str:
    """The output of a disassembler that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout


def sass_opcodes(sass: str) -> list[str]:
    """Opcodes without predicates: HGMMA of "  /*0a10*/  @!P0 HGMMA.64x128x16.F32 ..."."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
