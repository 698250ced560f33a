"""The project's structure: imports go down and in no circle, public functions are typed, and names are unique."""

import ast
import collections
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the modules of a folder never import, not even inside a function.
FORBIDDEN = {
    "pcfg": ("pretraining",),
    "pcfg.common": ("pcfg.engine", "pcfg.chart", "pcfg.grammar"),
    "pretraining.data": ("pretraining.training", "pretraining.evaluation"),
    "pretraining.model": ("pretraining.training", "pretraining.evaluation"),
    "pretraining.training": ("pretraining.evaluation",),
}
# A researcher can read the project only if it stays small: Python outside tests.
MAX_FILES = 112
MAX_LINES = 22_849
# File names that several folders have: each is the counterpart of the others.
COUNTERPARTS = {"__init__.py", "__main__.py", "grammar.py", "lookup.py", "source.py", "enlarge.py"}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def project_files() -> list[str]:
    """Paths of the project's Python files outside tests."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [path for path in listed if not path.startswith("tests/") and (ROOT / path).exists()]


def imports() -> dict[str, set[str]]:
    """The project's modules outside tests, and which of them each imports, wherever in the file."""
    paths = {module_name(path): ROOT / path for path in project_files()}
    graph = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[module] = (names & paths.keys()) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, or None."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return None
        for imported in sorted(graph[module]):
            if ring := visit(imported, [*path, module]):
                return ring
        finished.add(module)
        return None

    for module in graph:
        if ring := visit(module, []):
            return ring
    return None


def test_no_modules_import_each_other():
    graph = imports()
    assert len(graph) > 50
    assert circle(graph) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_imports_go_down():
    for module, imported in imports().items():
        for package, forbidden in FORBIDDEN.items():
            if is_within(module, package):
                assert not [name for name in imported for other in forbidden if is_within(name, other)], module


def is_typed(function: ast.FunctionDef, is_method: bool) -> bool:
    """Whether all parameters, but for self and cls, and the return have types; kernels of numba count as typed."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if any(word in decorator for decorator in decorators for word in ("jit", "overload", "intrinsic", "kernel")):
        return True
    signature = function.args
    parameters = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    if is_method and "staticmethod" not in decorators:
        parameters = parameters[1:]
    parameters += [parameter for parameter in (signature.vararg, signature.kwarg) if parameter]
    returns = function.returns is not None or function.name == "__init__"
    return returns and all(parameter.annotation for parameter in parameters)


def untyped(source: str) -> list[str]:
    """The public functions and methods of a module that lack types."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    names = []
    for body, prefix in [(tree.body, ""), *((node.body, f"{node.name}.") for node in classes)]:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                names += [] if is_typed(node, bool(prefix)) else [prefix + node.name]
    return names


def test_public_functions_are_typed():
    wrong = {path: names for path in project_files() if (names := untyped((ROOT / path).read_text()))}
    assert wrong == {}
    methods = "\n    def g(self, *a) -> int: ...\n    def _h(self, a): ...\n    def __init__(self, b: int): ..."
    assert untyped(f"def f(a, b: int) -> int: ...\nclass C:{methods}") == ["f", "C.g"]


def test_no_two_modules_share_a_name():
    names = collections.Counter(Path(path).name for path in project_files())
    assert {name for name, number in names.items() if number > 1} <= COUNTERPARTS


def test_the_project_stays_small():
    files = project_files()
    assert len(files) <= MAX_FILES
    assert sum((ROOT / path).read_text().count("\n") for path in files) <= MAX_LINES
