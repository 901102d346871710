"""Imports run one way, nothing heavy happens at import, and no code-bearing serialization is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import radixgen

ROOT = Path(radixgen.__file__).parent
LAYERS = [
    {"core", "version"},
    {"kernels", "reading"},
    {"sampling.beam_search", "cache"},
    {"scheduler"},
    {"calibration", "sampling.json_numbers", "text.messages", "text.vocabulary"},
    {"attention", "model", "sampling.sampler", "sampling.structured", "detokenize"},
    {
        "engine.batch_draws", "engine.check", "engine.deadlines", "engine.make_request", "engine.profiler",
        "engine.request_options", "engine.run_ahead", "engine.sequence_updates", "engine.throughput", "engine.warm_up",
        "sampling.grammar_budget",
    },
    {"engine.core"},
    {"engine.input_processor", "engine.output_processor", "text.template_variables"},
    {"text.chat_template"},
    {"chat.history"},
    {"chat.saved_history"},
    {"chat.dialogue"},
    {"chat.conversation", "chat.async_conversation", "engine.request_loop"},
    {"engine.submitter"},
    {"engine.pins"},
    {"engine.engine"},
    {"engine.async_outputs", "engine.thread"},
    {"engine.async_engine"},
    {"serve", "thoughts", "huggingface"},
    {"progress", "tree_view", "explain", "demo", "cli", "__main__"},
]  # fmt: skip
"""Modules and packages, from the bottom up; of some packages each module has a layer of its own."""
ROOMS = {name.split(".")[0] for names in LAYERS for name in names if "." in name}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SERVE_RANK = {"zmq": 1, "dynamo": 2, "http": 3, "live": 4, "server": 5}
"""Parts of `serve` that import what is below them; all its other modules have rank 0."""
MODULES = sorted(path for path in (*ROOT.rglob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("scheduler/*.py")))
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
PICKLES = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list", "send_pyobj", "recv_pyobj",
}  # fmt: skip
"""What other packages offer and would pickle: torch.distributed and ZeroMQ."""


def layer(name: str) -> str:
    """Name in `LAYERS` of a module `radixgen.…`, or of something in it."""
    parts = name.split(".")[1:]
    nested = ".".join(parts[:2])
    return nested if nested in RANK else parts[0]


def import_statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth of a module, except those for type checkers."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        todo.extend(ast.iter_child_nodes(node))


def imports(path: Path) -> list[str]:
    """Absolute names of modules that a module imports, and of what it imports from them."""
    names = imports_with_names(path)
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}: a relative import"
            names.append(str(node.module))
    return names


def imports_with_names(path: Path) -> list[str]:
    """Absolute names of what a module imports from others."""
    statements = [node for node in import_statements(path) if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{alias.name}" for node in statements for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    here = layer(module_name(path))
    if here in ROOMS:
        assert not imports(path), f"{path} is there for its docstring"
        return
    own = RANK[here]
    for name in imports(path):
        if name.startswith("radixgen.") and layer(name) not in ROOMS:
            other = layer(name)
            assert RANK[other] <= own, f"{path.name} imports {name}, a layer above"
            assert RANK[other] < own or other == here or own >= RANK["attention"], name
        if here == "core" or path.name in ("tree.py", "pool.py", "planner.py", "policy.py"):
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
    assert {layer(module_name(path)) for path in MODULES if path != ROOT / "__init__.py"} - ROOMS == set(RANK)


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
        ("radixgen.serve.zmq.client", {"msgspec", "numba", "zmq"}),
        ("radixgen.engine.engine", {"jinja2", "numba", "torch"}),
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
        "AsyncClient", "AsyncConversation", "AsyncEngine", "BeamSearchParams", "CacheHint", "Client",
        "CompletionOutput", "ContextOverflow", "Conversation", "DuplicateRequest", "Engine", "EngineClosed",
        "EngineDead", "HintResult", "HistoryBreak", "InvalidRequest", "LimitReached", "Limits", "ModelNotFound",
        "PromptTooLong", "QueueFull", "RadixgenError", "RequestFailed", "RequestOutput", "SamplingParams",
        "SegmentReuse", "SharingEnd", "Stats", "TreeAttention", "UnknownRequest", "UnsupportedModel", "__version__",
        "patch", "unpatch",
    ]  # fmt: skip
    assert all(hasattr(radixgen, name) for name in radixgen.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        radixgen.nothing  # noqa: B018
