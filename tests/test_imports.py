"""Imports run one way, nothing heavy happens at import, and no code-bearing serialization is used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import radixgen

ROOT = Path(radixgen.__file__).parent
LAYERS = [
    {"core", "version"},
    {"kernels"},
    {"beam_search", "cache"},
    {"scheduler"},
    {"calibration", "json_numbers", "messages", "vocabulary"},
    {"attention", "model", "sampling", "detokenize", "structured"},
    {"batch_draws", "engine_check", "grammar_budget", "request_options", "run_ahead", "sequence_updates", "warm_up"},
    {"engine_core"},
    {"input_processor", "output_processor", "template_variables"},
    {"chat_template"},
    {"chat_history"},
    {"saved_history"},
    {"dialogue"},
    {"conversation", "async_conversation", "request_loop"},
    {"engine"},
    {"async_outputs", "engine_thread"},
    {"async_engine"},
    {"serve", "thoughts"},
    {"progress", "tree_view", "explain", "demo", "cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SERVE_RANK = {"http": 1, "live": 2, "server": 3}
"""Parts of `serve` that import what is below them; all its other modules have rank 0."""
MODULES = sorted(path for path in (*ROOT.rglob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("scheduler/*.py")))
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
PICKLES = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list", "send_pyobj", "recv_pyobj",
}  # fmt: skip
"""What other packages offer and would pickle: torch.distributed and ZeroMQ."""


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute names of modules that a module imports, and of what it imports from them, except for type checkers."""
    found, todo = [], [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        todo.extend(ast.iter_child_nodes(node))
    return found


def imports_with_names(path: Path) -> list[str]:
    """As `imports`, with what is imported from each module."""
    found, todo = [], [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        todo.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    own = RANK[layer(path)]
    for name in imports(path):
        if name.startswith("radixgen."):
            other = name.split(".")[1]
            assert RANK[other] <= own, f"{path.name} imports {name}, a layer above"
            assert RANK[other] < own or other == layer(path) or own >= RANK["attention"], name
        if layer(path) == "core" or path.name in ("tree.py", "pool.py", "planner.py", "policy.py"):
            assert name.split(".")[0] not in ("torch", "transformers"), f"{path.name} imports {name}"
        assert name.split(".")[0] not in FORBIDDEN, f"{path.name} imports {name}"


def module_name(path: Path) -> str:
    return ".".join(("radixgen", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_imports_have_no_cycles() -> None:
    """Not even through imports within functions; those for type checkers do not count."""
    names = {module_name(path) for path in MODULES}
    graph = {
        module_name(path): {name if name in names else name.rpartition(".")[0] for name in imports_with_names(path)}
        for path in MODULES
    }
    while leaves := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in leaves}
    assert not graph, f"imports in a cycle, or that lead into one: {sorted(graph)}"


def test_imports_within_serve_run_one_way() -> None:
    """By parts, and without a cycle between modules."""
    paths = {module_name(path): path for path in (ROOT / "serve").rglob("*.py")}
    graph = {name: paths.keys() & set(imports(path)) - {name} for name, path in paths.items()}
    for name, others in graph.items():
        for other in others:
            assert serve_rank(other) <= serve_rank(name), f"{name} imports {other}"
    assert set(TopologicalSorter(graph).static_order()) == paths.keys()
    assert {serve_rank(name) for name in paths} == {0, *SERVE_RANK.values()}


def serve_rank(name: str) -> int:
    return SERVE_RANK.get(name.removeprefix("radixgen.serve.").split(".")[0], 0)


def test_every_module_has_a_layer() -> None:
    assert {layer(path) for path in MODULES} - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load"), f"{path.name} calls {called}"
            assert called.rpartition(".")[2] not in PICKLES, f"{path.name} calls {called}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), path.name
            assert called.rpartition(".")[2] not in ("recv_pyobj", "send_pyobj"), f"{path.name} calls {called}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {alias.name for alias in node.names}, path.name
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            assert path.name == "settings.py", f"{path.name} reads the environment"


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("radixgen", set()),
        ("radixgen.cli", set()),
        ("radixgen.cache", {"numba"}),
        ("radixgen.scheduler.planner", {"numba"}),
        ("radixgen.serve.client", {"msgspec", "numba", "zmq"}),
        ("radixgen.engine", {"jinja2", "numba", "torch"}),
    ],
)
def test_importing_radixgen_is_light(module: str, others: set[str]) -> None:
    """What takes long to import, or serves only some, comes when it is used."""
    heavy = {"torch", "transformers", "numba", "zmq", "msgspec", "gguf", "filelock", "jinja2", "fastapi", "llguidance"}
    code = f"import sys, {module}; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= others


def test_public_names() -> None:
    assert sorted(radixgen.__all__) == [
        "AsyncClient", "AsyncConversation", "AsyncEngine", "BeamSearchParams", "Client", "CompletionOutput",
        "ContextOverflow", "Conversation",
        "DuplicateRequest", "Engine", "EngineClosed", "EngineDead", "HistoryBreak", "InvalidRequest", "LimitReached",
        "Limits", "ModelNotFound", "PromptTooLong", "QueueFull", "RadixgenError", "RequestFailed", "RequestOutput",
        "SamplingParams", "SharingEnd", "Stats", "TreeAttention", "UnknownRequest", "UnsupportedModel", "__version__",
    ]  # fmt: skip
    assert all(hasattr(radixgen, name) for name in radixgen.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        radixgen.nothing  # noqa: B018
