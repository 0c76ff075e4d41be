"""Lays the package out as `kernels` loads it: relative imports, and operators in a namespace of the copy's own.

    OUT/torch-ext/siglip_kernels/   the package, with csrc/ inside; with build.toml and flake.nix for kernel-builder
    OUT/build/torch-<backend>/      the same for one kind of torch, with _ops.py and metadata.json
    OUT/benchmarks/, CARD.md        for `kernels benchmark`; the kernel's page

The namespace holds the digest of all files, so two versions that differ in anything can share a process. The package is
Python, and compiles its native code on first use: to the hub it is "noarch", one build for every torch.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
PACKAGE = "siglip_kernels"
NAME = "siglip-kernels"  # `kernels` allows no underscore
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
# What only a command needs, or another library; and the file that names the operators' namespace.
LEFT_OUT = ("__main__.py", "console.py", "integrations", "memory", "_ops.py")
CSRC_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")

BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = [{extensions}]
"""
FLAKE_NIX = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
OPS = '''"""The namespace of this copy's operators."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"{{ops.name}}::{{name}}"
'''
# Older versions of `kernels` load this file, not the one above it.
FOR_OLD_KERNELS = '''"""The module in the folder above."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{namespace}", Path(__file__).parents[1] / "__init__.py")
_module = sys.modules.get(_spec.name)
if _module is None:
    _module = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
'''


def lay_out(repo_id: str, out: Path, root: Path = ROOT) -> list[Path]:
    """Write everything into the new folder ``out``; returns the builds. ``root``: the source tree."""
    source = out / "torch-ext" / PACKAGE
    for path in package_files(root / PACKAGE):
        text = (root / PACKAGE / path).read_text(encoding="utf-8")
        write(source / path, with_relative_imports(text, path))
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in CSRC_SUFFIXES and "tests" not in path.relative_to(root).parts:
            write(source / path.relative_to(root), path.read_text(encoding="utf-8"))
    version = major_version(root)
    write(
        out / "build.toml",
        BUILD_TOML.format(
            name=NAME,
            version=version,
            license=LICENSE,
            repo_id=repo_id,
            backends=", ".join(f'"{backend}"' for backend in BACKENDS),
            extensions=", ".join(f'"{suffix[1:]}"' for suffix in (".py", *CSRC_SUFFIXES)),
        ),
    )
    write(out / "flake.nix", FLAKE_NIX)
    card = (
        (HERE / "card.md").read_text(encoding="utf-8").replace("OWNER/NAME", repo_id).replace("VERSION", str(version))
    )
    for folder in (out, out / "build"):  # to build from, and to upload, where it becomes README.md
        write(folder / "CARD.md", card)
    write(out / "benchmarks" / "benchmark.py", (HERE / "benchmark.py").read_text(encoding="utf-8"))
    unique = hashlib.sha256(json.dumps(digests(source)).encode()).hexdigest()[:7]
    return [build(source, out / "build", backend, f"_{PACKAGE}_{backend}_{unique}", version) for backend in BACKENDS]


def build(source: Path, folder: Path, backend: str, namespace: str, version: int) -> Path:
    """The build for one kind of torch."""
    variant = folder / f"torch-{backend}"
    shutil.copytree(source, variant)
    write(variant / "_ops.py", OPS.format(namespace=namespace))
    write(variant / PACKAGE / "__init__.py", FOR_OLD_KERNELS.format(namespace=namespace))
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests(variant)},
    }
    write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    return variant


def package_files(package: Path) -> list[Path]:
    """The files of the package that the copy has, relative to it."""
    found = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    return [path for path in found if path.parts[0] not in LEFT_OUT]


def with_relative_imports(text: str, path: Path) -> str:
    """The text of the module at ``path``, relative to the package. ValueError if an import cannot be made relative."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: import {PACKAGE} has no relative form: from {PACKAGE} import …")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inside = node.module.removeprefix(PACKAGE).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * len(path.parts)}{inside} ", 1)
    return "".join(lines)


def major_version(root: Path) -> int:
    """The kernel's version on the hub: it changes where the package's interface does."""
    for node in ast.parse((root / PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return int(str(ast.literal_eval(node.value)).partition(".")[0])
    raise ValueError(f"{PACKAGE} has no __version__")


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file, as metadata.json holds them."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
