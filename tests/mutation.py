"""How many small faults, planted one by one in cache and scheduler, do the tests notice?

    python tests/mutation.py --count 200 --seed 0

prints each mutant that no test noticed, then one JSON line, and exits with 1 where fewer than `--at-least` of them
were noticed. `--only scheduler/pins.py --count 999` tries every mutation of one file, and `--only FILE:LINE` those of
a line.

This process imports what the tests import, but nothing of radixgen. For each mutant it forks, and the child compiles
the mutated syntax tree in place of one module and runs a short suite: no file is written, and no import is repeated.
"""

import argparse
import ast
import gc
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from textwrap import shorten
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

Stage = Callable[[], None]
"""Part of the suite: it raises where a test fails."""

# -- the suite --------------------------------------------------------------------------------------------------------


def pytest_stage(*options: str) -> Stage:
    def run() -> None:
        status = pytest.main([*options, "-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"])
        if status != pytest.ExitCode.OK:
            raise AssertionError(status)

    return run


def machine_stage(module: str, name: str, *, examples: int, steps: int) -> Stage:
    def run() -> None:
        machine: type[RuleBasedStateMachine] = getattr(import_module(module), name)
        profile = settings(max_examples=examples, stateful_step_count=steps)
        run_state_machine_as_test(machine, settings=profile)

    return run


SCHEDULING = (
    pytest_stage("tests/test_scheduler.py"),
    machine_stage("churn", "EngineMachine", examples=20, steps=40),
)
CACHING = (
    pytest_stage(
        "tests/test_pool.py",
        "tests/test_tree.py",
        "tests/test_planner.py",
        "--deselect=tests/test_planner.py::test_long_chains_do_not_recurse",  # about depth, and a third of the suite
    ),
    machine_stage("test_tree_machine", "TreeMachine", examples=40, steps=60),
    *SCHEDULING,
)
HINTING = (pytest_stage("tests/test_cache_hints.py"), *SCHEDULING)
SEARCHING = (pytest_stage("tests/test_beam_search.py", "-k", "not architectures and not smollm2"),)
STORING = (pytest_stage("tests/test_model.py"),)

SUITES: dict[str, tuple[Stage, ...]] = {
    "radixgen/sampling/beam_search.py": SEARCHING,
    "radixgen/cache/boundary.py": CACHING,
    "radixgen/cache/columns.py": CACHING,
    "radixgen/cache/demotion.py": HINTING,
    "radixgen/cache/eviction.py": CACHING,
    "radixgen/cache/node.py": CACHING,
    "radixgen/cache/policy.py": CACHING,
    "radixgen/cache/pool.py": CACHING,
    "radixgen/cache/slots.py": CACHING,
    "radixgen/cache/storage.py": STORING,
    "radixgen/cache/tokens.py": CACHING,
    "radixgen/cache/tree.py": CACHING,
    "scheduler/batch.py": SCHEDULING,
    "scheduler/cache_hints.py": HINTING,
    "scheduler/reserves.py": SCHEDULING,
    "scheduler/scheduler.py": SCHEDULING,
    "scheduler/beams.py": SEARCHING,
    "scheduler/pins.py": SCHEDULING,
    "scheduler/planner.py": CACHING,
    "scheduler/queue.py": SCHEDULING,
}
"""For each file the stages that can notice a fault in it, the quickest first."""

EXCLUDED = {
    "_MIN_RUN = ": "the size of a new buffer, which grows",
    "grown = np.empty(": "the size of a grown buffer",
    "_FIRST_BLOCK = ": "how much is compared at once",
    "_LAST_BLOCK = ": "how much is compared at once",
    "min(block * 8": "how much is compared at once",
    "np.full(64": "the first size of a column, which grows",
    "np.zeros(64": "the first size of a column, which grows",
    "_FEW_ENTRIES": "when dead entries are swept out of a heap",
    "FIRST_RESERVE = ": "how far a leaf may grow in place",
    "_LARGEST_RESERVE = ": "how far a leaf may grow in place",
    "check_plan(plan": "an instrument of the tests",
    "tile_rows: int": "a cost measured on one machine",
    "0  ->  1  in  self.version = 0": "versions are only compared",
    "1  ->  2  in  self.version += 1": "versions are only compared",
    "1  ->  2  in  self._clock += 1": "times are only compared",
    "1  ->  2  in  self._serial += 1": "serials are only compared",
    "1  ->  2  in  self._num_entries += 1": "entries are only compared",
}
"""Mutants that could change speed alone, or nothing, by a part of what is printed of them, with the reason."""

# -- mutations --------------------------------------------------------------------------------------------------------

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
COMPLEMENTS = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
UNTOUCHED = {"annotation", "returns", "decorator_list"}


class Mutant(NamedTuple):
    """One fault: `new` in the place of `old`, a node of `tree`."""

    file: str
    tree: ast.Module
    old: ast.AST
    new: ast.AST
    line: int
    text: str
    """The line of source."""

    def __str__(self) -> str:
        before, after = (shorten(ast.unparse(node), 200) for node in (self.old, self.new))
        within = f"  in  {self.text}" if len(before) < len(self.text) else ""
        return f"{self.where}: {before}  ->  {after}{within}"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def module(self) -> str:
        return ".".join(("radixgen", *Path(self.file).with_suffix("").parts[-2:]))

    def compile(self) -> CodeType:
        """The module's code with the fault, which is written into `tree`: done by a child, seen by nobody else."""
        _Replace(self.old, self.new).visit(self.tree)
        return compile(ast.fix_missing_locations(self.tree), str(ROOT / self.file), "exec")


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, ast.copy_location(new, old)

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def unharmed(file: str) -> Mutant:
    """One that is the module itself."""
    tree = ast.parse((ROOT / file).read_text())
    return Mutant(file, tree, tree.body[0], tree.body[0], 1, "")


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of a file, but for those in `EXCLUDED`."""
    source = (ROOT / file).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    found = [Mutant(file, tree, old, new, line, lines[line - 1].strip()) for old, new, line in _faults(tree, 1)]
    return [mutant for mutant in found if not any(text in str(mutant) for text in EXCLUDED)]


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """One from each of `count` equal runs of `mutants`: every file, and every part of it, has its share."""
    chosen, size = random.Random(seed), len(mutants)
    count = min(count, size)
    return [mutants[chosen.randrange(i * size // count, (i + 1) * size // count)] for i in range(count)]


def _faults(node: ast.AST, line: int) -> Iterator[tuple[ast.AST, ast.AST, int]]:
    if _is_instrument(node):
        return
    line = getattr(node, "lineno", line)
    yield from ((old, new, line) for old, new in _variants(node))
    for field, value in ast.iter_fields(node):
        if field not in UNTOUCHED:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _faults(child, line)


def _is_instrument(node: ast.AST) -> bool:
    """Whether this only tells of faults or is there for the type checker: assertions, messages, `strict=True`."""
    match node:
        case ast.FunctionDef(name=name):
            return name in ("check", "__repr__") or name.startswith("_check")
        case ast.Assert() | ast.JoinedStr() | ast.keyword(arg="strict") | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _variants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of a node, this one or its condition, and what may stand in its place.

    Operators are replaced with the expression around them: the parser uses one object for all of a kind.
    """
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                if type(op) in SWAPS:
                    yield node, _with(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield node, _with(node, op=SWAPS[type(op)]())
        case ast.AugAssign(op=op):
            yield node, ast.Pass()
            if type(op) in SWAPS:
                yield node, _with(node, op=SWAPS[type(op)]())
        case ast.Break() | ast.Continue():
            yield node, SWAPS[type(node)]()
        case ast.Expr(value=ast.Call()):
            yield node, ast.Pass()
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield node, _with(node, func=ast.Name(NAMES[name], ast.Load()))
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            yield node, _with(node, func=_with(node.func, attr=NAMES[name]))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, operand
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield node, ast.Constant(value + 1)
        case ast.Return(value=ast.expr() as value) if not _is_falsy(value):
            yield node, ast.Return(ast.Constant(None))
        case ast.If(test=test) | ast.IfExp(test=test) if not _has_complement(test):
            yield test, ast.UnaryOp(ast.Not(), test)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**dict(ast.iter_fields(node)) | fields)


def _is_falsy(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def _has_complement(test: ast.expr) -> bool:
    """Whether another mutation negates it already."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare(ops=[op]):
            return isinstance(op, COMPLEMENTS)
    return False


# -- trials -----------------------------------------------------------------------------------------------------------


class Fault(MetaPathFinder, Loader):
    """Imports one module from `code`, and leaves all others to those who come after."""

    def __init__(self, module: str, code: CodeType) -> None:
        self.module, self.code = module, code

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        return spec_from_file_location(fullname, self.code.co_filename, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


SURVIVED, KILLED, UNREACHED = 0, 1, 2
"""Exit statuses of a child."""

MEMORY = 4 << 30
"""Bytes that a child may take: a loop that never ends often grows a list."""


def preload() -> None:
    """Import all that the tests import but the repository's own: a fork starts where they begin."""
    own = {"radixgen", *(path.stem for path in TESTS.glob("*.py"))}
    probe = "import sys, churn, radixgen.engine.engine; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    for name in subprocess.check_output([sys.executable, "-c", probe], env=environment, text=True).split():
        if name.partition(".")[0] not in own:
            with suppress(Exception):
                import_module(name)
    gc.collect()
    gc.freeze()


def fork(suite: Sequence[Stage], mutants: Sequence[Mutant], timeout: int, *, silent: bool = True) -> int:
    """Run the suite over `mutants` in a child, whose alarm kills it after `timeout` seconds. Returns its process id."""
    child = os.fork()
    if child:
        return child
    status = KILLED
    try:
        _confine(timeout)
        if silent:
            _silence()
        sys.meta_path[:0] = [Fault(mutant.module, mutant.compile()) for mutant in mutants]
        for stage in suite:
            stage()
        status = SURVIVED if all(mutant.module in sys.modules for mutant in mutants) else UNREACHED
    except BaseException:
        if not silent:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _confine(timeout: int) -> None:
    signal.alarm(timeout)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    logging.disable()


def trials(mutants: list[Mutant], jobs: int, timeout: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and what became of it, as they end; up to `jobs` run at a time."""
    waiting, running = mutants[::-1], dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[fork(SUITES[mutant.file], [mutant], timeout)] = mutant
        child, status = os.wait()
        yield running.pop(child), _outcome(status)


def _outcome(status: int) -> str:
    if os.WIFSIGNALED(status):
        return "timed out" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
    assert os.WEXITSTATUS(status) != UNREACHED, "the suite does not import the module"
    return "survived" if os.WEXITSTATUS(status) == SURVIVED else "killed"


def rehearse(timeout: int) -> float:
    """Seconds that the suite takes, each stage once, with every module replaced by itself. Exits unless it passes."""
    stages = dict.fromkeys(stage for suite in SUITES.values() for stage in suite)
    begun = time.monotonic()
    _, status = os.waitpid(fork(list(stages), [unharmed(file) for file in SUITES], timeout, silent=False), 0)
    if status:
        sys.exit(f"the suite fails without a fault: {_outcome(status)}")
    return time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--only", metavar="FILE[:LINE]", help="of one file or line")
    parser.add_argument("--at-least", type=float, default=0.85, help="the share to be killed")
    parser.add_argument("--timeout", type=int, default=60, help="seconds after which a mutant counts as killed")
    options = parser.parse_args()

    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(TESTS)]
    torch.set_num_threads(1)
    settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutation")
    preload()

    places = [mutant for file in SUITES for mutant in mutants_of(file) if options.only in (None, file, mutant.where)]
    chosen = sample(places, options.count, options.seed)
    print(f"{len(chosen)} of {len(places)} mutants; the suite takes {rehearse(options.timeout):.1f} s", flush=True)
    begun = time.monotonic()
    outcomes: dict[str, Counter[str]] = {}
    for number, (mutant, outcome) in enumerate(trials(chosen, options.jobs, options.timeout), 1):
        outcomes.setdefault(mutant.file, Counter())[outcome] += 1
        if outcome == "survived":
            print(f"[{number}/{len(chosen)}] {mutant}", flush=True)
    total = sum(outcomes.values(), Counter())
    report = _counts(total) | {"seconds": round(time.monotonic() - begun)}
    print(json.dumps(report | {"files": {file: _counts(counts) for file, counts in sorted(outcomes.items())}}))
    return int(report["killed"] < options.at_least * report["total"])


def _counts(outcomes: Counter[str]) -> dict[str, int]:
    """Those that timed out are among the killed."""
    total, survived = outcomes.total(), outcomes["survived"]
    return {"total": total, "killed": total - survived, "survived": survived, "timed_out": outcomes["timed out"]}


if __name__ == "__main__":
    sys.exit(main())
