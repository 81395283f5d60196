"""The project's style as a test: what may import what, how long things are, what text never says.

    rule                                              packages   benchmarks   tests
    layers, full modules, no cycles                      x           x
    third-party modules, clock, environment, randomness  x
    functions <= 70 lines, every signature annotated     x           x           x
    modules <= 400 lines                                 x           x
    no `utils`, no notes for later, no machine's paths   every file of the project

Packages are `kvstore` and `worker`. Benchmarks measure, so they read the clock, and compare with
anything; tests take the world apart to see what holds. The files are read in
`tests/source_tree.py`; generated stubs are left out.
"""

import ast
import re
import subprocess
import sys

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    functions,
    imported_modules,
    imports,
    is_ours,
    is_within,
    module_file,
    modules,
    project_files,
    unannotated,
)

MAX_FUNCTION_LINES = 70
MAX_MODULE_LINES = 400

#: Low to high; a module imports its own layer and those below. A module of `kvstore` that no layer
#: names is one of the parts. Entries are modules, or packages with all they hold.
LEAVES, PARTS, WIRE, ENDS, CLUSTER, COMMAND, WORKER, BENCHMARKS = range(8)
LAYERS: dict[str, int] = {
    "kvstore.errors": LEAVES,
    "kvstore.clock": LEAVES,
    "kvstore.fs": LEAVES,
    "kvstore.settings": LEAVES,
    "kvstore.config": LEAVES,
    "kvstore.retention": LEAVES,
    "kvstore.machine": LEAVES,
    "kvstore.process": LEAVES,
    "kvstore.cell": LEAVES,
    "kvstore.namespace": LEAVES,
    "kvstore.key": LEAVES,
    "kvstore.block": LEAVES,
    "kvstore": PARTS,
    "kvstore.rpc": WIRE,
    "kvstore.client": ENDS,
    "kvstore.entry": ENDS,
    "kvstore.contacts": ENDS,
    "kvstore.cluster_routes": ENDS,
    "kvstore.server": ENDS,
    "kvstore.copier": ENDS,
    "kvstore.cluster": CLUSTER,
    "kvstore.doctor": COMMAND,
    "kvstore.cli": COMMAND,
    "kvstore.cli_blocks": COMMAND,
    "kvstore.cli_options": COMMAND,
    "worker": WORKER,
    "benchmarks": BENCHMARKS,
}

#: Directions within and across layers that the order alone does not forbid: who, whom, why.
FORBIDDEN: tuple[tuple[str, str, str], ...] = (
    ("kvstore.client", "kvstore.server", "a client reaches a server over gRPC"),
    ("kvstore.transport", "kvstore.node", "transports move bytes and know no authority"),
    ("worker.engines", "kvstore.cluster", "engines use the client side"),
    ("worker.engines", "kvstore.server", "engines use the client side"),
    ("worker.connector", "kvstore.cluster", "the connector uses the client side"),
    ("worker.connector", "kvstore.server", "the connector uses the client side"),
)

#: Third-party and standard modules that only some of our modules may import: module, who, else.
OWNERS: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("worker",), "the tier runs without torch"),
    "transformers": (("worker",), "the tier knows no engine"),
    "safetensors": (("worker",), "the tier knows no model files"),
    "gguf": (("worker",), "the tier knows no model files"),
    "accelerate": (("worker",), "the tier knows no engine"),
    "triton": (("worker",), "the tier runs without torch"),
    "ray": (("kvstore.cluster",), "everything else runs without Ray"),
    "grpc": (("kvstore.rpc",), "everything else runs without gRPC"),
    "google": (("kvstore.rpc",), "protobuf messages stay on the wire"),
    "lmdb": (("kvstore.tiers.nvme",), "only the NVMe tier has a catalog"),
    "time": (("kvstore.clock",), "take a kvstore.clock.Clock as an argument"),
    "datetime": (("kvstore.clock",), "take a kvstore.clock.Clock as an argument"),
    "pydantic": (("kvstore.config", "kvstore.settings"), "elsewhere plain dataclasses do"),
    "tests": ((), "what ships does not know its tests"),
    "click": (
        ("kvstore.cli", "kvstore.cli_blocks", "kvstore.cli_options", "worker"),
        "only commands parse command lines",
    ),
}
ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
ENVIRONMENT_READERS = ("kvstore.config", "kvstore.cluster.launch")
#: What `random` and `numpy.random` offer without a hidden global state.
SEEDED = ("Random", "SystemRandom", "Generator", "default_rng", "PCG64", "SeedSequence")

# With a bracket in each, so that this file does not say what it forbids.
FORBIDDEN_TEXT: dict[str, str] = {
    r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b": "do it now or file an issue",
    r"DESIG[N]\.md": "say it in the project's own words, in docs/",
    r"\.\./share[d]": "only what is in this repository exists for a reader",
    r"(?<![\w.~])/(wor[k]|tmp/[s]|opt/pyp[i]|opt/wheel[s]|roo[t])/": "a machine's own path",
}
VAGUE_NAMES = re.compile(r"^(utils?|common|helpers?|misc)$")


def layer(name: str) -> int:
    """By the longest entry of LAYERS that holds the module."""
    return LAYERS[max((entry for entry in LAYERS if is_within(name, entry)), key=len)]


def report(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


def test_imports_point_down() -> None:
    complaints = []
    for module in modules(*PACKAGES, "benchmarks"):
        for found in imports(module):
            for target in filter(is_ours, imported_modules(found)):
                where = f"{module.at(found.node)}: {module.name} imports {target}"
                if layer(target) > layer(module.name):
                    complaints.append(f"{where}, which is in a higher layer")
                complaints += [
                    f"{where}: {why}"
                    for who, whom, why in FORBIDDEN
                    if is_within(module.name, who) and is_within(target, whom)
                ]
    report(complaints)


def test_no_import_cycles() -> None:
    every = modules(*PACKAGES, "benchmarks")
    graph = {
        module.name: sorted(
            {
                target
                for found in imports(module)
                for target in imported_modules(found)
                if is_ours(target) and target != module.name
            }
        )
        for module in every
    }
    done: set[str] = set()

    def cycle_from(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        if name not in done:
            for target in graph.get(name, ()):
                if found := cycle_from(target, (*path, name)):
                    return found
            done.add(name)
        return ()

    report([" -> ".join(found) for name in graph if (found := cycle_from(name, ()))])


def test_full_modules_are_imported() -> None:
    complaints = []
    for module in modules(*PACKAGES, "benchmarks"):
        for found in imports(module):
            where = f"{module.at(found.node)}: {module.name}"
            if isinstance(found.node, ast.ImportFrom) and found.node.level:
                complaints.append(f"{where} has a relative import; write the full name")
            file = module_file(found.target) if is_ours(found.target) else None
            if file is None or file.name != "__init__.py":
                continue
            # Generated stubs need not be there for this rule to hold.
            complaints += [
                f"{where} takes {name} from the package {found.target}; import it from its module"
                for name in found.names
                if module_file(f"{found.target}.{name}") is None and "_pb2" not in name
            ]
        if module.path.name == "__init__.py":
            body = [n for n in module.tree.body if not isinstance(n, ast.Expr)]
            if body:
                complaints.append(f"{module.at(body[0])}: __init__.py holds a docstring at most")
    report(complaints)


@pytest.mark.parametrize("restricted", OWNERS)
def test_module_is_imported_only_by_its_owners(restricted: str) -> None:
    owners, why = OWNERS[restricted]
    report(
        [
            f"{module.at(found.node)}: {module.name} imports {restricted}; {why}"
            for module in modules(*PACKAGES)
            if not any(is_within(module.name, owner) for owner in owners)
            for found in imports(module)
            if is_within(found.target, restricted)
        ]
    )


def test_only_config_reads_the_environment() -> None:
    complaints = []
    for module in modules(*PACKAGES):
        if module.name in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(module.tree):
            taken: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                taken = [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                taken = [alias.name for alias in node.names]
            complaints += [
                f"{module.at(node)}: os.{name}; make it a setting in kvstore/config.py"
                for name in taken
                if name in ENVIRONMENT and isinstance(node, ast.expr | ast.stmt)
            ]
    report(complaints)


def test_randomness_is_an_argument() -> None:
    complaints = []
    for module in modules(*PACKAGES):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr not in SEEDED:
                source = ast.unparse(node.value)
                if source in ("random", "np.random", "numpy.random"):
                    complaints.append(
                        f"{module.at(node)}: {source}.{node.attr} has a global state; take a "
                        "seeded generator as an argument"
                    )
    report(complaints)


def test_functions_are_short() -> None:
    report(
        [
            f"{module.at(function)}: {function.name} has {lines} of {MAX_FUNCTION_LINES} lines"
            for module in modules(*PACKAGES, "benchmarks", "tests", "proto", "native")
            for function in functions(module)
            if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
        ]
    )


def test_modules_are_short() -> None:
    report(
        [
            f"{module.path.relative_to(ROOT)} has {module.lines} of {MAX_MODULE_LINES} lines"
            for module in modules(*PACKAGES, "benchmarks", "proto", "native")
            if module.lines > MAX_MODULE_LINES
        ]
    )


def test_signatures_are_annotated() -> None:
    report(
        [
            f"{module.at(function)}: {function.name} lacks types of {', '.join(bare)}"
            for module in modules(*PACKAGES, "benchmarks", "tests", "proto", "native")
            for function in functions(module)
            if (bare := unannotated(function))
        ]
    )


def test_names_say_what_is_inside() -> None:
    report(
        [
            f"{path.relative_to(ROOT)}: {part} says nothing; name the file after its one noun"
            for path in project_files()
            for part in path.relative_to(ROOT).with_suffix("").parts
            if VAGUE_NAMES.match(part)
        ]
    )


def test_files_say_nothing_that_does_not_belong() -> None:
    complaints = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            complaints += [
                f"{path.relative_to(ROOT)}:{number}: {found.group()!r}; {why}"
                for pattern, why in FORBIDDEN_TEXT.items()
                if (found := re.search(pattern, line))
            ]
    report(complaints)


IMPORT_WITHOUT = """
import importlib, sys
missing, names = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(missing))
for name in names:
    importlib.import_module(name)
"""


def import_without(missing: str, names: list[str]) -> None:
    """Imports the modules in a fresh interpreter in which the `missing` ones cannot be."""
    command = [sys.executable, "-c", IMPORT_WITHOUT, missing, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        report([f"without {missing}:", *done.stderr.splitlines()[-4:]])


def test_tier_imports_without_torch() -> None:
    names = [module.name for module in modules("kvstore")]
    import_without("torch,transformers,safetensors", [n for n in names if "__main__" not in n])


def test_tier_imports_without_ray_outside_cluster() -> None:
    names = [module.name for module in modules("kvstore") if layer(module.name) < CLUSTER]
    import_without("ray,torch,transformers", [n for n in names if "__main__" not in n])
