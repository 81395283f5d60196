"""Compiles the C sources here into `kvstore/`, where there is a C compiler.

One file, two uses: a step of every wheel and editable install (`hatch_build.py`), and a script for
whoever changes the C source (`python native/compile.py`; `CC` names another compiler than `cc`).

The libraries are git-ignored and nothing depends on them: without them `kvstore/leaves.py` and
`kvstore/table.py` do the same work in Python. They run on every processor of their architecture, as
a wheel must; those with AVX2 and AVX-512 are only used where that is there.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "native"
FLAGS = ("-O3", "-std=c11", "-Wall", "-Wextra", "-fPIC", "-shared")
#: Of every library: its source, and the flags that it needs besides.
EVERYWHERE = {"libleaves.so": ("leaves.c",), "libprobe.so": ("probe.c",)}
ON_X86_64 = {
    "libleaves_avx2.so": ("leaves.c", "-mavx2"),
    "libleaves_avx512.so": ("leaves.c", "-mavx512f"),
}


def compile_all(compiler: list[str], folder: Path) -> tuple[list[Path], str]:
    """Replaces the libraries in `folder`; which there are now, and why not all."""
    libraries = EVERYWHERE | (ON_X86_64 if platform.machine() == "x86_64" else {})
    made, complaint = [], ""
    for name, (source, *flags) in libraries.items():
        library = folder / name
        fault = run_compiler([*compiler, *FLAGS, *flags, str(SOURCES / source)], library)
        if fault:
            complaint = fault
            library.unlink(missing_ok=True)  # it would be of another source
        else:
            made.append(library)
    return made, complaint


def run_compiler(command: list[str], library: Path) -> str:
    """Compiles one library; what went wrong.

    What stands at its place is replaced at once and never written to: a process may have it mapped.
    """
    staged = library.with_suffix(".partial")
    try:
        subprocess.run([*command, "-o", str(staged)], check=True, capture_output=True, text=True)
        os.replace(staged, library)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "it said nothing").splitlines()[-1]
        return f"{command[0]} ended with status {error.returncode}: {last}"
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    finally:
        staged.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    libraries, complaint = compile_all(shlex.split(os.environ.get("CC") or "cc"), ROOT / "kvstore")
    for library in libraries:
        print(library.relative_to(ROOT))
    if complaint:
        print(
            f"Blocks will be found and moved slower than they could: {complaint}", file=sys.stderr
        )
