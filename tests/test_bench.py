"""The benchmarks of tree and planner run to their end at toy size. Nothing here looks at a clock."""

import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import families
import numpy as np
import pytest
import texts
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from scripted_model import tokenizer
from served import over_socket
from transformers import LlamaConfig, LlamaForCausalLM

from bench import (
    admission,
    agents,
    attention,
    beam,
    calibrate,
    cluster,
    compare,
    cpu,
    data_parallel,
    engine,
    explain,
    gpu,
    host_tier,
    http,
    kv_dtype,
    live,
    llama_cpp,
    loads,
    model,
    peers,
    plan,
    plots,
    reading,
    readme,
    restart,
    segments,
    serve,
    simulate,
    soak,
    startup,
    step,
    thoughts,
    tiers,
    tree,
)
from bench import (
    families as bench_families,
)
from bench.device import Ceilings
from bench.mixes import make_agents, make_groups
from bench.null import NullModel
from bench.orders import ORDERS
from bench.report import Memory, Report
from bench.sessions import SHARED, read_agents, read_conversations
from bench.trees import WORKLOADS, Tree, chain, lay_out, levels, shared_prefix
from bench.workloads import TOY as TOY_SCALE
from bench.workloads import Ask
from radixgen import AsyncClient, Engine, Limits, SamplingParams
from radixgen.kernels.torch_backend import TorchAttention
from radixgen.scheduler import planner
from radixgen.serve.zmq.worker import Worker


@pytest.fixture(autouse=True)
def any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admission, plan, tree):
        monkeypatch.setattr(module, "measure_memory", lambda: Memory(compare=1e9, copy=1e9))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_pages_show_the_results_that_are_kept() -> None:
    assert "\n".join(readme.highlights()) in readme.README.read_text(encoding="utf-8")
    assert readme.tables() in readme.BENCHMARKS.read_text(encoding="utf-8")
    assert "\n".join(readme.misses()) in readme.BENCHMARKS.read_text(encoding="utf-8")
    for table in (readme.routing(), readme.parallel()):
        assert table in readme.CLUSTER.read_text(encoding="utf-8")
    assert readme.policies() in readme.INEXACT.read_text(encoding="utf-8")


def test_no_missed_bound_is_left_out() -> None:
    missed = sum(len(json.loads(path.read_text())["missed"]) for path in readme.RESULTS.glob("*.json"))
    header = 2
    assert len(readme.misses()) - header == missed > 0


def test_startup(capsys) -> None:
    assert startup.main(["--repeats", "1"]) == 0
    assert last_line(capsys)["import_seconds"] > 0


def test_admission(capsys) -> None:
    assert admission.main(["--burst", "12", "--crowd", "30", "--prefixes", "200", "90"]) == 0
    figures = last_line(capsys)
    assert 1 <= figures["burst_comparisons"] <= 4 and 1 <= figures["crowd_comparisons"] <= 4
    assert figures["crowd_total"] >= figures["worst_ms"] / 1e3 > 0


TOY = ["--runs", "2", "--pool", "30000", "--nodes", "60", "200", "--operations", "20"]


def test_tree_on_a_trace_made_up(capsys) -> None:
    assert tree.main(["--requests", "12", *TOY]) == 0
    figures = last_line(capsys)
    assert figures["benchmark"] == "tree" and not figures["conversation_trace"]
    for pool in ("unlimited", "limited"):
        assert len(figures[f"{pool}_seconds"]) == 2
        assert figures[f"{pool}_tokens_per_second"] > 0 and figures[f"{pool}_ratio_to_limit"] > 0
    assert 0 < figures["limited_hit_percent"] <= figures["unlimited_hit_percent"]
    assert figures["extend_ratio"] > 0 and figures["evict_ratio"] > 0


def test_tree_on_a_file(capsys, tmp_path) -> None:
    records = [
        {"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [0, 1]},
        {"timestamp": 1, "input_length": 1300, "output_length": 1, "hash_ids": [0, 1, 2]},
        {"timestamp": 2, "input_length": 700, "output_length": 1, "hash_ids": [0, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert tree.main([str(path), *TOY]) == 0
    figures = last_line(capsys)
    assert figures["prompt_tokens"] == 3000
    assert figures["unlimited_hit_percent"] == pytest.approx(100 * (1000 + 512) / 3000, abs=0.1)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a chat template."""
    return texts.saved_model(tmp_path_factory.mktemp("spoken"))


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of benchmarks are threads of this process, which begin at once."""

    @contextmanager
    def server(path: Path, port: int, *options: str, core: int | None = None) -> Iterator[str]:
        given = dict(zip(options[::2], options[1::2], strict=True))
        seats, queue = int(given.get("--max-num-seqs", 64)), int(given.get("--max-queue", 64))
        built = Engine(path, kv_tokens=int(given["--kv-tokens"]), limits=Limits(max_num_seqs=seats))
        with over_socket(built, port=port, max_open=seats + queue) as served:
            yield served.url

    for module in (http, soak):
        monkeypatch.setattr(module, "server", server)


@pytest.mark.usefixtures("in_thread")
def test_http(capsys, spoken) -> None:
    options = ["--streams", "2", "--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "1"]
    assert http.main(options, spoken) == 0
    figures = last_line(capsys)
    assert 0 < figures["outputs_2"] <= 1 and figures["ratio_2"] > 0 and len(figures["ttft_ms_2_http"]) == 2


@pytest.mark.usefixtures("in_thread")
def test_soak(capsys, spoken) -> None:
    """Held against what time has no part in."""
    options = ["--seconds", "2", "--warm-up", "0.3", "--max-tokens", "6", "--kv-tokens", "512"]
    assert soak.main(options, spoken) == 0
    figures = last_line(capsys)
    assert figures["faults"] == figures["left"] == 0
    assert figures["statuses"]["200"] and figures["asked"]["whole"] and not set(figures["missed"]) & {"faults", "left"}


def test_beam_search(capsys, tmp_path) -> None:
    families.build("llama").save_pretrained(tmp_path)
    options = ["--widths", "2", "--prompt-tokens", "9", "--new-tokens", "5", "--repeats", "1"]
    assert beam.main(options, tmp_path) == 0
    figures = last_line(capsys)
    assert figures["same_2"] == 2 and figures["rows_2"] == 9 + 2 * 4
    assert figures["seconds_2_radixgen"] > 0 and figures["seconds_2_generate"] > 0


def test_serve(capsys, tmp_path, monkeypatch) -> None:
    """With the worker in a thread: starting a process takes longer than all the rest."""
    families.build("llama").save_pretrained(tmp_path)

    @contextmanager
    def worker(path: Path, address: str, kv_tokens: int) -> Iterator[None]:
        served = Worker(Engine(path, kv_tokens=kv_tokens), [address])
        thread = threading.Thread(target=served.run)
        thread.start()
        yield
        served.drain()
        thread.join()

    monkeypatch.setattr(serve, "worker", worker)
    options = ["--streams", "1", "3", "--prompt-tokens", "5", "--new-tokens", "6", "--repeats", "1"]
    assert serve.main(options, tmp_path) == 0
    figures = last_line(capsys)
    assert figures["outputs_1"] > 0 and figures["ratio_3"] > 0
    assert len(figures["ttft_ms_3_zmq"]) == 2 and figures["rate_3_engine"] > 0


def test_data_parallel(capsys, monkeypatch) -> None:
    """With the replicas in threads."""

    @contextmanager
    def replicas(client: AsyncClient, count: int, folder: str, kv_tokens: int) -> Iterator[None]:
        with ExitStack() as stack:
            for index in range(count):
                replica = Engine(folder, load_format="dummy", kv_tokens=kv_tokens, debug=True)
                served = Worker(replica, [client.address], engine_index=index, drain_timeout=0.1)
                thread = threading.Thread(target=served.run)
                thread.start()
                stack.callback(thread.join)
                stack.callback(served.drain)
            yield

    monkeypatch.setattr(data_parallel, "start_replicas", replicas)
    assert data_parallel.main([]) == 0
    figures = last_line(capsys)
    assert figures["speed_up"] > 0 and figures["1 x 6"]["hit_rate"] > figures["1 x 3"]["hit_rate"] > 0.5


def test_kv_dtype(capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        kv_dtype, "measure_model", lambda name: ({"text": 9.0 if name == "auto" else 9.09}, [[1, 2, 3], [4, 5, 6]])
    )
    assert kv_dtype.main(["--keys", "300"]) == 0
    figures = last_line(capsys)
    assert 0 < figures["error_int8"] < 0.01 and figures["cpu_int8"] > 0
    assert figures["perplexity_int8_text"] == pytest.approx(0.01) and figures["greedy_int8"]["tokens"] == 3
    assert "perplexity_int8_text" in figures["missed"]


def test_reading(capsys, spoken, tmp_path) -> None:
    sizes = ["--context", "200", "--lengths", "140", "--needles", "2", "--shares", "0.5", "0.75", "--repeats", "1"]
    assert reading.main(["--model", str(spoken), *sizes]) == 0
    figures = last_line(capsys)
    assert figures["needle_length"] == 140 and figures["seconds_exact"] > 0
    assert [row["policy"] for row in figures["rows"]] == [name for name in reading.POLICIES for _ in range(2)]
    for row in figures["rows"]:
        assert 0 < row["keys"] <= 200 and row["decode"] > 0 and 0 <= row["needles"] <= 2
        assert row["agreement"]["of"] == reading.CONTINUATIONS
        assert row.get("perplexity", 0) > 0 or row["policy"] == "top_blocks"
    (tmp_path / "reading.json").write_text(json.dumps(figures))
    assert plots.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "reading.svg").exists()


def test_segments(capsys, monkeypatch) -> None:
    answers = [[[1, 2, 3]]] * 2
    exact = segments.Figures([100, 90], [2.0, 1.0], answers, [0.5, 0.5], [3.0, 3.0])
    moved = segments.Figures([100, 18], [2.0, 0.5], [[[1, 2, 3]], [[1, 4, 3]]], [0.5, 0.6], [3.0, 3.0])
    monkeypatch.setattr(segments, "ORDERS", segments.ORDERS[:2])
    monkeypatch.setattr(segments, "measure", lambda settings: {"prefix": exact, "segments": moved})
    assert segments.main(["--check"]) == 1
    figures = last_line(capsys)
    assert figures["computed"] == pytest.approx(118 / 190) and figures["computed_later"] == pytest.approx(0.2)
    assert figures["first_token"] == 0.5 and figures["greedy"] == {"equal": 0, "of": 1, "tokens": 1.0}
    assert figures["perplexity_answer"] == pytest.approx(np.exp(0.1) - 1) and figures["perplexity_following"] == 0
    assert figures["missed"] == ["computed", "first_token", "perplexity_answer"]


def test_segments_in_new_orders(capsys, monkeypatch) -> None:
    monkeypatch.setattr(segments, "GPU_COUNT", 4)
    monkeypatch.setattr(segments, "GPU_LENGTH", 100)
    assert segments.main(["--gpu", "--recompute", "0.1"]) == 0
    figures = last_line(capsys)
    assert figures["recompute"] == 0.1 and figures["first_token"] > 0


def test_host_tier(capsys) -> None:
    assert host_tier.main([]) == 0
    figures = last_line(capsys)
    without, hosted = figures["agents, without"], figures["agents, with"]
    assert without["fetched"] == 0 < hosted["fetched"] and hosted["rows"] < without["rows"]
    assert figures["fetched_tokens"] >= 5 * host_tier.TOY.prefix


def test_tiers(capsys) -> None:
    assert tiers.main(["--alive", "8", "--tiers", "3e6", "--requests", "200", "--check"]) == 0
    figures = last_line(capsys)
    assert 0 < figures["coding agents, made up, 8 alive"]["alone"] < 100 and not figures["missed"]


def test_restart(capsys) -> None:
    assert restart.main(["--toy"]) == 0
    figures = last_line(capsys)
    assert figures["read_tokens"] == 128 and figures["bytes"] > 128 * 256
    assert figures["seconds_opening"] > 0 and len(figures["bounds"]) == 2


def test_equal_ids_give_equal_tokens() -> None:
    long, short = tree.expand([7, 3, 9], 1536), tree.expand([5, 3], 600)
    assert long.dtype == np.int32 and long.size == 1536 and short.size == 600
    assert np.array_equal(long[512:600], short[512:600])
    assert not np.array_equal(long[:512], short[:512])
    assert long.min() >= 0 and np.unique(long).size > 1500


def test_plan(capsys) -> None:
    assert plan.main(["--leaves", "9", "--times", "3"]) == 0
    figures = last_line(capsys)
    assert figures["benchmark"] == "plan" and figures["leaves"] == 9
    for shape in plan.SHAPES:
        assert figures[f"{shape}_from_nothing_ms"] > 0 and figures[f"{shape}_carried_ms"] > 0
        assert figures[f"{shape}_nodes"] == 2 * 9 - 1
        assert set(figures[f"{shape}_pieces_ms"]) == {*(p.strip("_") for p in plan.PIECES), "rest"}


def test_a_missed_bound_fails_a_check(capsys) -> None:
    report = Report("x")
    report.figure("slow", 2.0, "slow", at_most=1.0)
    report.figure("fine", 2.0, "fine", at_least=1.0)
    assert report.finish(check=False) == 0 and report.finish(check=True) == 1
    assert last_line(capsys)["missed"] == ["slow"]


def test_simulate_on_a_trace_made_up(capsys) -> None:
    assert simulate.main(["--requests", "12", "--pools", "4e4", "1e6", "--mixes"]) == 0
    figures = last_line(capsys)
    assert [run["order"] for run in figures["runs"]] == ["first come", "longest prefix", "groups"] * 2
    for run in figures["runs"]:
        assert 0 <= run["hit_rate"] <= figures["ideal_hit_rate"] + 1e-9
        assert run["computed"] + run["hit_rate"] <= 1 + run["preemptions"]
        assert run["latency_p50_seconds"] >= 0.02


def test_simulate_on_small_mixes(capsys, monkeypatch) -> None:
    mixes = {"agents": partial(make_agents, 3, 2), "groups": partial(make_groups, 8, 3)}
    monkeypatch.setattr(simulate, "MADE", mixes)
    assert simulate.main(["--requests", "6", "--pools", "1e6", "--mixes", *mixes, "trace"]) == 0
    figures = last_line(capsys)
    assert [mix["requests"] for mix in figures["mixes"]] == [6, 24, 6]
    for mix in figures["mixes"]:
        names = [run["order"] for run in mix["runs"]]
        assert names == ["first come", "longest prefix", "groups", "unlimited", "prompts free"]
        assert mix["runs"][0]["over_first_come"] == 1
        assert all(run["wait_p99_seconds"] >= run["wait_p50_seconds"] >= 0 for run in mix["runs"])


@pytest.mark.parametrize("order", ["first come", "longest prefix", "groups"])
def test_orders(order: str) -> None:
    """Two documents in turn, and room for one request at a time."""
    documents = [[1] * 40, [2] * 40]
    options = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    with ORDERS[order].engine(NullModel(), kv_tokens=60, max_step_tokens=64, limits=Limits(max_num_seqs=1)) as engine:
        names = [engine.submit([*documents[place % 2], 3 + place], options, output_kind="final") for place in range(6)]
        ended = [output.request_id for _ in range(60) if engine.has_unfinished for output in engine.step()]
    turns = [names.index(name) for name in ended]
    assert turns == ([0, 1, 2, 3, 4, 5] if order == "first come" else [0, 2, 4, 1, 3, 5])


def test_cluster_on_sessions_made_up(capsys) -> None:
    options = ["--replicas", "3", "--sessions", "12", "--requests", "96", "--blocks", "20000", "--pool", "2000000"]
    assert cluster.main(options) == 0
    agents, conversations = last_line(capsys)["settings"]
    assert len(agents["variants"]) == 14 and "variants" not in conversations
    for rows in (agents["contenders"], conversations["contenders"], agents["faults"], agents["variants"]):
        for one in rows:
            assert 0 < one["hit_rate"] < 1 and 1 <= one["load"] <= 3 and 0 < one["busy"] <= 1
            assert 0 < one["wait_p50_seconds"] <= one["wait_p99_seconds"]
    rule, affinity, *others = agents["contenders"]
    assert all(rule["hit_rate"] > one["hit_rate"] < affinity["hit_rate"] for one in others)
    assert all(one["sent_again"] > 0 for one in agents["faults"])


def test_cluster_on_files(capsys, tmp_path) -> None:
    """What the traces say is what sessions are: two of coding agents, two chains of conversations."""
    lines = [
        {"session": "1", "t": 0, "in": 200, "out": 5, "runs": [[1, 3]]},
        {"session": "1", "t": 9, "in": 330, "out": 5, "runs": [[1, 2], [7, 3]]},
        {"session": "2", "t": 3, "in": 70, "out": 5, "runs": [[1, 1]]},
    ]
    (tmp_path / "agents").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [
        {"timestamp": 0, "input_length": 1_000, "output_length": 5, "hash_ids": [0, 4]},
        {"timestamp": 50, "input_length": 500, "output_length": 5, "hash_ids": [0]},
        {"timestamp": 2_000, "input_length": 1_500, "output_length": 5, "hash_ids": [0, 4, 9]},
    ]
    (tmp_path / "chats").write_text("".join(json.dumps(line) + "\n" for line in lines))
    agents, chats = read_agents(tmp_path / "agents"), read_conversations(tmp_path / "chats")
    assert [[turn.pause for turn in session] for session in agents.sessions] == [[0, 9], [0]]
    assert [[turn.pause for turn in session] for session in chats.sessions] == [[0, 2], [0]]
    first, second = (turn.prompt(100).tolist() for turn in chats.sessions[0])
    assert second[:2] == first == [0, SHARED + 100] and second[2] == SHARED + 101
    options = ["--agents", str(tmp_path / "agents"), "--conversations", str(tmp_path / "chats"), "--pool", "100000"]
    assert cluster.main([*options, "--replicas", "2", "--sessions", "4", "--requests", "32", "--blocks", "9000"]) == 0
    assert [one["requests"] for one in last_line(capsys)["settings"]] == [32, 32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one takes minutes on a GPU")
def test_attention(capsys) -> None:
    assert attention.main([]) == 0
    (row,) = last_line(capsys)["rows"]
    assert set(row["contenders"]) == {"radixgen", "unshared", "prefix", "naive"}
    assert all(found["difference"] < 1e-6 for found in row["contenders"].values())
    assert calibrate.main([]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real ones take minutes on a GPU")
def test_model_and_engine(capsys) -> None:
    assert model.main([]) == 0
    assert last_line(capsys)["rows"] == 3
    assert engine.main([]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["engine_W2", "engine_W3", "engine_W4", "engine_W10"]
    figures = {key for line in lines for key in line}
    assert {f"W2_{prefix}_{plan}" for prefix in (16, 32) for plan in ("auto", "unshared", "private")} <= figures
    assert {"W3_auto", "W3_prefix", "W3_unshared", "W4_3_seconds", "W10_C_radixgen"} <= figures
    assert gpu.main([]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one takes minutes on a GPU")
def test_compare(capsys) -> None:
    assert compare.main(["--alone", "--engines", "radixgen", "--workloads", "latency", "thoughts"]) == 0
    about, latency, search = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["engine"] == "radixgen" and about["step_tokens"] == 2048
    assert latency["workload"] == "latency" and latency["tokens"] == 4
    assert search["workload"] == "thoughts" and search["tokens"] == 2 * (1 + 2) * 2 * 3


def test_cpu(capsys, monkeypatch, spoken) -> None:
    monkeypatch.setattr(cpu, "cpu_ceilings", lambda dtype: Ceilings(read=1e9, copy=1e9, matrix=1e9))
    names = ["questions", "parallel"]
    assert cpu.main(["--model", str(spoken), "--toy", "--runs", "2", "--check", "--workloads", *names]) == 0
    figures = last_line(capsys)
    for name in names:
        seconds = figures[name]["runs"]
        assert list(seconds) == ["radixgen float32", "radixgen bfloat16", "transformers float32"]
        assert all(len(runs) == 2 and min(runs) > 0 for runs in seconds.values())
        assert 0 < figures[name]["limits"]["bfloat16"] <= figures[name]["limits"]["float32"]
    assert figures["equal_tokens_transformers float32"] == TOY_SCALE.new


class FakeLlama:
    """llama.cpp's calls, for a model whose next token depends on the tokens before it and their order."""

    vocabulary = 50

    def __init__(self) -> None:
        self.cells: dict[int, list[int]] = {}
        self.computed = 0
        self.logits = np.zeros((0, self.vocabulary), np.float32)

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Calls without effect, and handles."""
        return lambda *_: 1

    def llama_version(self) -> bytes:
        return b"0"

    def llama_context_default_params(self) -> ctypes.Structure:
        params = llama_cpp._Params()
        params.data[120 : 120 + len(llama_cpp.SWITCHES)] = llama_cpp.SWITCHES
        return params

    def llama_vocab_n_tokens(self, vocabulary: int) -> int:
        return self.vocabulary

    def llama_memory_clear(self, memory: int, data: bool) -> None:
        self.cells.clear()

    def llama_memory_seq_rm(self, memory: int, slot: int, first: int, end: int) -> bool:
        del self.cells[slot][first:]
        return True

    def llama_memory_seq_cp(self, memory: int, source: int, target: int, first: int, end: int) -> None:
        assert not self.cells.get(target)
        self.cells[target] = list(self.cells[source])

    def llama_decode(self, context: int, batch: ctypes.Structure) -> int:
        size, rows = batch.n_tokens, []
        tokens, positions = ((ctypes.c_int32 * size).from_address(field) for field in (batch.token, batch.pos))
        slots = [ctypes.c_int32.from_address(one).value for one in (ctypes.c_uint64 * size).from_address(batch.seq_id)]
        wanted = (ctypes.c_int8 * size).from_address(batch.logits)
        for token, position, slot, is_wanted in zip(tokens, positions, slots, wanted, strict=True):
            held = self.cells.setdefault(slot, [])
            assert position == len(held)
            held.append(token)
            if is_wanted:
                rows.append(np.eye(self.vocabulary, dtype=np.float32)[self.following(held)])
        self.logits = np.array(rows)
        self.computed += size
        return 0

    def llama_get_logits(self, context: int) -> object:
        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def following(self, tokens: list[int]) -> int:
        return hash(tuple(tokens)) % self.vocabulary

    def alone(self, prompt: list[int], count: int) -> list[int]:
        """The answer to a prompt, without sharing."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.following(tokens))
        return tokens[len(prompt) :]


@pytest.mark.parametrize("batch", [2048, 3])
def test_llama_cpp_shares_what_prompts_begin_with(monkeypatch, batch: int) -> None:
    monkeypatch.setattr(llama_cpp, "BATCH", batch)
    library = FakeLlama()
    engine = llama_cpp.LlamaCpp(library, Path("it"), sequences=6, length=64, threads=1, unified=True, flash=True)
    document, longer = list(range(20)), [*range(20), 30, 31]
    asks = [
        Ask([[*document, 40], [*document, 41, 42], [*document, 43]], 4),
        Ask([document], 2),
        Ask([longer, [*longer, 5]], 3, n=3),
        Ask([[7, 8, 9], [7]], 2),
        Ask([[7, 8, 9]], 1, n=6),
    ]
    for ask in asks:
        for prompt, samples in zip(ask.prompts, engine.answer(ask), strict=True):
            assert samples == [library.alone(prompt, ask.new)] * ask.n
    engine.reset()
    library.computed = 0
    first, second = asks[0], engine.answer(asks[0])
    assert library.computed == len(document) + 4 + 3 * (first.new - 1)
    library.computed = 0
    talks = [[*prompt, *samples[0], 1, 2] for prompt, samples in zip(first.prompts, second, strict=True)]
    assert engine.answer(Ask(talks, 1)) == [[library.alone(talk, 1)] for talk in talks]
    assert library.computed == 3 * 3
    (samples,) = engine.answer(Ask([document], 1, n=6, temperature=1e3))
    assert len({token for (token,) in samples}) > 1


def test_a_gguf_file_in_another_data_type(tmp_path) -> None:
    matrix, scales = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), np.ones(64, np.float32)
    writer = GGUFWriter(tmp_path / "published.gguf", "llama")
    writer.add_array("names", ["a", "b"])
    writer.add_uint32("count", 7)
    writer.add_tensor("matrix", quantize(matrix, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("scales", scales)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama_cpp.convert(tmp_path / "published.gguf", tmp_path / "new.gguf", GGMLQuantizationType.BF16)
    found = GGUFReader(tmp_path / "new.gguf")
    assert [found.fields[name].contents() for name in ("names", "count")] == [["a", "b"], 7]
    assert found.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_BF16
    assert [tensor.tensor_type.name for tensor in found.tensors] == ["BF16", "F32"]
    numbers = dequantize(found.tensors[0].data, found.tensors[0].tensor_type)
    np.testing.assert_allclose(numbers, matrix, atol=0.01)
    assert numbers.shape == matrix.shape


def test_a_stage_is_kept_for_its_commit_device_and_arguments(monkeypatch, tmp_path) -> None:
    now = {"commit": "abc", "device": "chip", "torch": "2", "arguments": "--save"}
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)

    def kept(name: str, *, full: bool = False, **here: str) -> bool:
        monkeypatch.setattr(gpu, "surroundings", lambda: now | here)
        return gpu.kept(name, full=full)

    assert not kept("calibration")
    for name in ("calibration", "attention"):
        (tmp_path / f"{name}.json").write_text(json.dumps(now))
    assert kept("calibration") and not kept("calibration", device="another") and not kept("calibration", commit="abd")
    assert kept("attention", full=True) and not kept("attention")
    (tmp_path / "model.json").write_text(json.dumps(now | {"commit": "abc-dirty"}))
    assert not kept("calibration", commit="abc-dirty")


def test_plots(tmp_path) -> None:
    def row(workload: str, **times: float) -> dict:
        contenders = {name: {"cold_us": time} for name, time in times.items()} | {"failed": {"error": "x"}}
        return {"workload": workload, "name": "t", "heads": [4, 2], "roofline_us": 1.0, "contenders": contenders}

    rows = [
        row("A", radixgen=2, unshared=5, prefix=4, naive=3, peer=4),
        row("B", radixgen=2, unshared=3, prefix=4, naive=5),
    ]
    found = {"device": "chip", "date": "today", "commit": "abc", "rows": rows}
    (tmp_path / "attention.json").write_text(json.dumps(found))
    assert plots.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.glob("attention_*")}
    assert drawn == {f"attention_{name}.{kind}" for name in ("speedup", "roofline") for kind in ("png", "svg")}


TREES = [
    shared_prefix(5, 48, 7), shared_prefix(3, 40, 16), shared_prefix(4, 32, 0), levels("1,2,6 / 3,1,20"), chain(4, 8),
    ([-1, -1], [5, 16], [0, 1, 0]),
]  # fmt: skip


def held(pages: peers.Paged, segment: int) -> list[float]:
    begin, end = pages.indptr[segment : segment + 2]
    return pages.k[pages.indices[begin:end], :, 0, 0].flatten()[: pages.lengths[segment]].tolist()


def slots_of(tree: Tree) -> tuple[list[list[int]], torch.Tensor]:
    forest, nodes, _ = lay_out(tree)
    pool = torch.arange(int(forest.lengths.sum()), dtype=torch.float32).view(-1, 1, 1)
    return [peers.path_slots(forest, row).tolist() for row in peers.paths(forest, nodes.tolist())], pool


@pytest.mark.parametrize("tree", TREES)
def test_pages_hold_each_rows_path(tree: Tree, monkeypatch) -> None:
    expected, pool = slots_of(tree)
    found = dict(peers.paged_rows(tree, pool, -pool))
    assert found and all(pages.private == (len(found) == 2 and not suffix) for suffix, pages in found.items())
    for suffix, pages in found.items():
        assert suffix in ("", f"_page{pages.page_size}")
        assert [held(pages, row) for row in range(len(expected))] == expected
        assert torch.equal(pages.v, -pages.k)
        table = peers.block_table(pages)
        for row, (begin, end) in enumerate(zip(pages.indptr, pages.indptr[1:], strict=False)):
            assert np.array_equal(table[row, : end - begin], pages.indices[begin:end])
            assert (end - begin - 1) * pages.page_size + pages.last_page_len[row] == pages.lengths[row]
    monkeypatch.setattr(peers, "PRIVATE_BYTES", 0)
    assert not any(pages.private for _, pages in peers.paged_rows(tree, pool, -pool))


@pytest.mark.parametrize("tree", TREES)
def test_levels_of_a_cascade_add_up_to_each_rows_path(tree: Tree) -> None:
    expected, pool = slots_of(tree)
    found: list[list[int]] = [[] for _ in expected]
    cascade = peers.paged_levels(tree, pool, -pool)
    for level in cascade:
        assert level.qo_indptr[0] == 0 and level.qo_indptr[-1] == len(expected)
        for segment, (begin, end) in enumerate(zip(level.qo_indptr, level.qo_indptr[1:], strict=False)):
            for row in range(begin, end):
                found[row] += held(level.segments, segment)
    assert found == expected if cascade else tree in (TREES[4], TREES[5])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tree", TREES)
def test_flex_attention_is_given_the_plans_mask(tree: Tree) -> None:
    """Uncompiled, and so on any device."""
    cpu_device = torch.device("cpu")
    q, k, v = attention.inputs(tree, (4, 2), cpu_device)
    made = planner.plan(*lay_out(tree))
    order = torch.from_numpy(made.row_order)
    expected, _ = TorchAttention(made, None, cpu_device)(q[order], k, v, attention.HEAD_DIM**-0.5)
    ((name, call, facts),) = peers.pytorch_flex(tree, q, k, v, compiled=False)
    assert name == "pytorch_flex"
    torch.testing.assert_close(call()[facts["back"]], expected[torch.argsort(order)], rtol=1e-4, atol=1e-4)


def test_a_peer_that_fails_is_reported(monkeypatch) -> None:
    def two(tree: Tree, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, without: list) -> object:
        yield "broken", lambda: q[:, 0, 0, 0, 0], {"plan_ms": 1.0}
        yield "wrong", lambda: torch.ones_like(q), {}

    monkeypatch.setattr(attention, "peers", two)
    row = attention.Row("toy", "a prefix", (4, 2), 0.0)
    attention.run_row(row, shared_prefix(3, 20, 5), None, torch.device("cpu"))
    assert "difference" in row.contenders["naive"] and "IndexError" in row.contenders["broken"]["error"]
    assert row.contenders["wrong"]["error"].startswith("ValueError: differs by")


def test_every_workload_has_its_trees() -> None:
    for name, rows in WORKLOADS.items():
        built = [tree for _, tree in rows()]
        assert len(built) == {"W1": 12, "W5": 15, "W7": 12, "W8": 9, "W9": 18, "W12": 13}[name]
        for parents, lengths, standing in built:
            assert len(parents) == len(lengths) and max(standing) < len(parents)
            assert all(parent < node for node, parent in enumerate(parents))


def test_loads(capsys, monkeypatch) -> None:
    for published, counted in loads.COUNTED.values():
        assert loads.by_tiles(published) == pytest.approx(counted, abs=0.005)
    toy = {"fits a tile": (shared_prefix(8, 64, 16), 9.0), "many": (levels("1,4,64 / 256,8,8"), 0.5)}
    monkeypatch.setattr(loads, "COUNTED", toy)
    monkeypatch.setattr(loads, "FASTTREE", {"F": "1,4 / 40,8"})
    assert loads.main([]) == 0
    figures = last_line(capsys)
    for name in (*toy, "F"):
        assert 1 <= figures[f"{name}: keys"] <= figures[f"{name}: loads"] and figures[f"{name}: units"] >= 1
    assert figures["missed"] == ["many: loads"] and figures["F: theirs"] == 1


@pytest.mark.parametrize("options", [[], ["--fresh"]])
def test_explain(capsys, monkeypatch, options: list[str]) -> None:
    monkeypatch.setattr(explain, "load_tokenizer", lambda name: texts.tokenizer())
    assert explain.main(["--prompts", "30", "--tokens", "3000", *options]) == 0
    figures = last_line(capsys)
    assert figures["prompts"] == 30 and figures["distinct_tokens"] < figures["tokens"]
    assert figures["timestamp_first"] == 1 and figures["divergences"][0]["prompts"] == 30


def test_bytes_loaded_count_partials_twice() -> None:
    tree = shared_prefix(8, 640, 16)
    naive = planner.plan(*lay_out(tree), mode="naive")
    keys, partials = loads.loads(naive, 640 + 8 * 16)
    assert keys == 1 and naive.num_units == 9
    assert partials == 2 * (8 * 2) * 32 * 129 * 4 / ((640 + 8 * 16) * 8 * 256 * 2)


def test_other_shapes(capsys) -> None:
    assert bench_families.main([]) == 0
    figures = last_line(capsys)
    for name in bench_families.FAMILIES:
        assert figures[f"{name}_1_ms"] > 0 and figures[f"{name}_3_limit_ms"] > 0


def test_step(capsys, monkeypatch) -> None:
    monkeypatch.setattr(step, "SEQUENCES", 4)
    monkeypatch.setattr(step, "STEPS", 3)
    assert step.main([]) == 0
    figures = last_line(capsys)
    for case in ("greedy", "temperature", "top_p", "detokenized"):
        assert figures[f"{case}_ms"] > 0 and len(figures[f"{case}_pieces_ms"]) == 7


def test_live(capsys, monkeypatch) -> None:
    monkeypatch.setattr(live, "READINGS", 3)
    assert live.main(["--nodes", "60", "--huge", "90", "--seconds", "0"]) == 0
    figures = last_line(capsys)
    assert figures["nodes_ms"] > 0 and figures["huge_elsewhere_ms"] > 0 and figures["nodes_count"] >= 60


def test_agents(capsys, tmp_path) -> None:
    texts.saved_model(tmp_path)
    toy = ["--agents", "3", "--turns", "2", "--system-tokens", "30", "--new-tokens", "3"]
    assert agents.main([*toy, "--check", "--model", str(tmp_path)]) == 0
    figures = last_line(capsys)
    assert figures["benchmark"] == "agents" and figures["computed_rows"] == figures["distinct_tokens"]
    assert figures["generated_tokens"] == 3 * 2 * 3 and figures["prompt_tokens"] > figures["computed_rows"]
    assert all(figures[f"{name}_over_shared"] > 0 for name in ("generate", "unshared"))


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_thoughts(capsys, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    sizes = ["--puzzles", "2", "--breadth", "2", "--depth", "2", "--proposals", "3", "--new-tokens", "4"]
    assert thoughts.main(["--model", str(tmp_path), "--batch", "5", *sizes]) == 0
    figures = last_line(capsys)
    assert 2 < figures["expansions"] <= 2 * 3 and figures["sequences"] <= 2 * (3 * 3 + 3 * 3 * 3)
    assert figures["distinct_tokens"] <= figures["rows"] <= 1.02 * figures["distinct_tokens"]
    assert figures["rows_unshared"] > figures["prompt_tokens"] > 10 * figures["rows"]
    assert figures["equal_trees"] and not figures["missed"]
    for name in ("shared", "unshared", "generate", "generate_prefix"):
        assert figures[f"seconds_{name}"] > 0


@torch.inference_mode()
def test_replays_on_a_kept_prefix_are_the_same(capsys) -> None:
    """Padding between the prefix and a prompt's rest, or behind it, changes nothing."""
    model, prefix = tiny_llama(), list(range(40, 60))
    rests = [[1, 2, 3], [4, 5, 6, 7], [9]]
    for scored in (False, True):
        batch = [thoughts.Asked(prefix + rest, [10, 11][: 1 + len(rest) % 2], scored) for rest in rests]
        assert thoughts.common_prefix(batch) == prefix
        whole, kept = (thoughts.Replay(model, p).run(batch) for p in ([], prefix))
        for row, one in enumerate(batch):
            (alone,) = thoughts.Replay(model, []).run([one])
            if scored:
                at, size = len(one.prompt) - min(len(o.prompt) for o in batch), len(one.rest)
                for found in (whole, kept):
                    torch.testing.assert_close(found[row, at : at + size], alone[:size], atol=1e-5, rtol=0)
            else:
                for found in (whole, kept):
                    assert found[row, -2:].tolist()[: len(alone) - len(one.prompt)] == alone[len(one.prompt) :].tolist()
    assert thoughts.distinct_tokens(batch) == 20 + sum(map(len, rests)) + 2 and not capsys.readouterr().out
