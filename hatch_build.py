"""What is made before the files of a wheel are collected, editable ones included.

    proto/generate.py     gRPC stubs, without which nothing runs
    native/compile.py     the native library, without which it runs slower

Each is a script of its own, for whoever changes its sources.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STEPS = ("proto/generate.py", "native/compile.py")


class GenerateAndCompile(BuildHookInterface[Any]):
    """What hatchling calls."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for step in STEPS:
            subprocess.run([sys.executable, step], cwd=self.root, check=True)
        if any(Path(self.root, "kvstore").glob("*.so")):
            # The library knows nothing of Python, so one wheel serves all its versions.
            machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{machine}"
