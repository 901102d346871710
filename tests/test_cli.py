"""The command line, on a tiny model with a tokenizer."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import texts
import typer
from typer.testing import CliRunner, Result

from radixgen import Engine, SamplingParams
from radixgen.cli import app, options, serve
from radixgen.core import EngineDead
from radixgen.serve.replicas import ReplicaOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.saved_model(tmp_path_factory.mktemp("model"))


def call(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_generate_from_arguments(model: Path) -> None:
    found = lines(call("generate", "--model", model, "--kv-tokens", 256, "--max-tokens", 3, "abc", "abd"))
    assert [len(one["outputs"][0]["token_ids"]) for one in found] == [3, 3]
    assert [one["num_prompt_tokens"] for one in found] == [3, 3]


def test_generate_from_a_file_and_from_stdin(model: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    written = ["abc", json.dumps({"prompt": [5, 6, 7], "id": "mine"}), "", json.dumps({"messages": messages})]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(written))
    options = ("generate", "--model", model, "--kv-tokens", 512, "--max-tokens", 2, "--n", 2, "--seed", 1)
    found = lines(call(*options, "--temperature", 1.0, "--file", file))
    assert [one["num_prompt_tokens"] for one in found] == [3, 3, len("u:hi;a:")]
    assert found[1]["id"] == "mine" and [one["index"] for one in found[0]["outputs"]] == [0, 1]
    assert lines(call(*options, "--temperature", 1.0, stdin=file.read_text())) == found


def test_generate_under_a_reading_policy(model: Path) -> None:
    options = ("generate", "--model", model, "--kv-tokens", 64, "--max-tokens", 2, "abc")
    policy = json.dumps({"policy": "window", "window": 1, "block": 1, "prompt": True})
    assert [one["exact"] for one in lines(call(*options)) + lines(call(*options, "--reading", policy))] == [True, False]
    for bad, says in (("{", "is not JSON"), ("3", "must be an object"), ('{"policy": "none"}', "must be one of exact")):
        result = call(*options, "--reading", bad)
        assert result.exit_code == 1 and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "says"),
    [
        ("{", "line 1"),
        ('{"x": 1}', "messages"),
        ('ok\n{"prompt": "a", "messages": []}', "line 2"),
        ('{"x": "[/]"}', "[/]"),
        (json.dumps({"x": "long " * 50}), "must hold"),
        ('{"prompt": 5}\n{"prompt": 6}', "list of token ids"),
        ('{"prompt": null}', "list of token ids"),
        ('{"prompt": [1, "a"]}', "list of token ids"),
        ('{"prompt": [99999999999999999999]}', "list of token ids"),
        ('{"messages": []}', "list of objects"),
        ('{"messages": "hi"}', "list of objects"),
        ('{"messages": ["hi"]}', "list of objects"),
        ('ok\n[{"role": "user", "content": "hi"}]', "line 2"),
        ('"Hello"', "an object"),
        ("[1, 2, 3]", '{"prompt"'),
    ],
)
@pytest.mark.parametrize("command", ["generate", "tree", "explain"])
def test_bad_lines_are_named_in_one_line(model: Path, command: str, stdin: str, says: str) -> None:
    result = call(command, "--model", model, stdin=stdin)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_a_file_that_is_no_text_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts").write_bytes(b"\xff\xfe")
    result = call("generate", "--model", model, "--file", "prompts")
    assert result.exit_code == 1 and "file='prompts': is not text" in result.stderr


def test_a_line_ends_at_a_newline_alone(model: Path, tmp_path: Path) -> None:
    """U+2028 inside a JSON string cut the line in two; a byte order mark made the first line a text prompt."""
    file = tmp_path / "prompts.jsonl"
    written = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ("a\u2028b", "c")]
    file.write_bytes(("\ufeff" + "\r\n".join(written)).encode())
    found = lines(call("generate", "--model", model, "--kv-tokens", 64, "--max-tokens", 1, "--file", file))
    assert len(found) == 2 and found[1]["num_prompt_tokens"] == 1


def test_a_model_without_chat_template_takes_no_messages(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path)
    plain = texts.tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    line = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    for command in (["generate", "--kv-tokens", 64], ["tree"], ["explain"]):
        result = call(*command, "--model", tmp_path, stdin=line)
        assert result.exit_code == 1 and "no chat template" in result.stderr.splitlines()[-1]


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    result = call("generate", "--model", tmp_path / "absent", "hello")
    assert result.exit_code == 1 and "ModelNotFound" in result.output and "Traceback" not in result.output


def test_later_turns_of_a_chat_hit_the_cache(model: Path) -> None:
    result = call("chat", "--model", model, "--kv-tokens", 512, "--max-tokens", 4, stdin="hello\nagain\n")
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if "prompt tokens were cached" in line]
    assert len(said) == 2 and said[0].startswith("0 of ")
    assert int(said[1].split()[0]) >= len("u:hello;a:")


def test_tree(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("shared head one\nshared head two\n")
    result = call("tree", file, "--model", model)
    assert result.exit_code == 0, result.output
    assert "2 prompts, 30 tokens, 18 distinct" in result.output and "shared head" in result.output


@pytest.mark.parametrize("line", ["[INST] hi", '"Hello" said', "[" * 100_000], ids=["inst", "quoted", "deep"])
def test_a_line_that_is_not_json_is_text(model: Path, line: str) -> None:
    result = call("tree", "--model", model, stdin=line)
    assert result.exit_code == 0 and f"1 prompts, {len(line)} tokens" in result.output


def test_tools_reach_the_template(tmp_path: Path) -> None:
    """Only `explain` gave them to it."""
    families.build("llama").save_pretrained(tmp_path)
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + texts.TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    line = json.dumps({"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "search"}]})
    count = len("searchu:hi;a:")
    (found,) = lines(call("generate", "--model", tmp_path, "--kv-tokens", 64, "--max-tokens", 1, stdin=line))
    assert found["num_prompt_tokens"] == count
    for command in ("tree", "explain"):
        assert f"{count} tokens" in call(command, "--model", tmp_path, stdin=line).output


def test_doctor() -> None:
    result = call("doctor")
    assert result.exit_code == 0 and all(name in result.output for name in ("torch", "flash-attn", "cache", "fastapi"))
    told = " ".join(result.output.replace("│", " ").split())
    assert "attention: torch used: the fastest" in told or "attention: triton used: the fastest" in told
    assert "attention: flash not used" in told


def test_serve_refuses_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RADIXGEN_API_KEY", raising=False)
    absent = tmp_path / "absent"
    for arguments, says in (
        (["--host", "0.0.0.0"], "is reachable by others and requires an API key: --api-key"),
        (["--metrics-compat", "x"], "must be one of vllm"),
        (["--port", "70000"], "65535"),
        (["--api-key", "a b "], "printable ASCII"),
        (["--max-queue", "-2000"], "max_open"),
        (["--profile", __file__], f"profile='{__file__}': must be a directory that can be written to"),
        (["--profile", tmp_path, "--profile-steps", "0"], "profile_steps=0: must be from 1 to 1000"),
    ):
        result = call("serve", absent, *arguments)
        assert result.exit_code == 1 and says in result.stderr and result.stderr.count("\n") == 1
    result = call("serve", absent, "--host", "0.0.0.0", "--api-key", "k")
    assert result.exit_code == 1 and "ModelNotFound" in result.stderr
    monkeypatch.setenv("RADIXGEN_API_KEY", "one, two")
    assert "ModelNotFound" in call("serve", absent, "--host", "0.0.0.0").stderr


def test_serve_knows_near_names_of_its_options() -> None:
    result = call("serve", "--max-model-length", 5)
    assert result.exit_code == 2 and "--max-model-len" in result.stderr


def test_serve_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixgen.cli.errors.find_spec", lambda name: None if name == "uvicorn" else name)
    result = call("serve", "absent")
    assert result.exit_code == 1 and "uvicorn not installed: pip install 'radixgen[serve]'" in result.stderr


def test_generate_writes_a_profile(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    options = ("generate", "--model", model, "--kv-tokens", 64, "--max-tokens", 4, "--profile", folder, "abc")
    result = call(*options)
    (path,) = folder.iterdir()
    assert len(lines(result)) == 1 and f"wrote the profile to {path}" in result.stderr
    traced = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert [name for name in traced if name.startswith("step ")] == ["step 1", "step 2", "step 3"]
    result = call(*options, "--profile-steps", 2)
    assert len(lines(result)) == 1 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("command", [["generate", "abc"], ["worker"], ["worker", "--backend", "dynamo"]], ids=str)
def test_a_profile_that_cannot_be_written_is_refused(command: list[str], tmp_path: Path) -> None:
    result = call(*command, "--model", tmp_path / "absent", "--profile", __file__)
    assert result.exit_code == 1 and "must be a directory that can be written to" in result.stderr
    result = call(*command, "--model", tmp_path / "absent", "--profile", tmp_path, "--profile-steps", 1001)
    assert result.exit_code == 1 and "profile_steps=1001: must be from 1 to 1000" in result.stderr


def test_generate_in_a_grammar(model: Path, tmp_path: Path) -> None:
    options = ("generate", "--model", model, "--kv-tokens", 512, "--max-tokens", 100, "--temperature", 1, "--seed", 1)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, "b"]}, "maxItems": 3}')
    assert lines(call(*options, "--choice", "yes", "--choice", "no", "abc"))[0]["outputs"][0]["text"] in ("yes", "no")
    assert lines(call(*options, "--regex", "[xy]{4}", "abc"))[0]["outputs"][0]["text"].strip("xy") == ""
    written = json.loads(lines(call(*options, "--json-schema", schema, "abc"))[0]["outputs"][0]["text"])
    assert len(written) <= 3 and all(one in (1, "b") for one in written)
    refused = call(*options, "--regex", "(", "abc")
    assert refused.exit_code == 1 and "llguidance says" in " ".join(refused.stderr.split())


ENGINE_OPTIONS = {
    "--load-format": "dummy",
    "--dtype": "bfloat16",
    "--quantization": "int8",
    "--kv-cache-dtype": "int8",
    "--device": "cpu",
    "--tp": 2,
    "--tensor-parallel-size": 2,
    "--max-model-len": 512,
    "--max-num-batched-tokens": 64,
    "--kv-tokens": 4096,
    "--kv-offloading-size": 0.5,
    "--kv-dir": "kept",
    "--kv-dir-size": 2.5,
    "--enforce-eager": None,
    "--no-warm-up": None,
    "--seed": 0,
    "--profile": "traces",
    "--profile-steps": 10,
}


@pytest.mark.parametrize("option", ENGINE_OPTIONS)
def test_options_of_an_engine_are_refused_in_front_of_workers(option: str) -> None:
    """By name, also with the value that is the default."""
    value = ENGINE_OPTIONS[option]
    result = call("serve", "--zmq", "ipc:///nowhere", option, *([] if value is None else [value]))
    names = {"--tensor-parallel-size": "tp", "--no-warm-up": "warm_up"}
    name = names.get(option, option.strip("-").replace("-", "_"))
    assert result.exit_code == 1 and f"InvalidRequest {name}=" in result.stderr, result.stderr
    assert "radixgen worker" in result.stderr


def test_every_option_of_an_engine_is_known() -> None:
    arguments = set(inspect.signature(Engine).parameters)
    assert set(options.ENGINE_OPTIONS.values()) <= arguments
    commands = set(inspect.signature(serve.serve).parameters)
    assert set(options.ENGINE_OPTIONS) | set(options.PROCESS_OPTIONS) <= commands
    assert arguments & commands <= {*options.ENGINE_OPTIONS.values(), *options.PROCESS_OPTIONS, "model", "reuse"}


@pytest.mark.parametrize("others", [["--zmq", "ipc:///nowhere/handshake"], ["-dp", 2]])
@pytest.mark.parametrize("option", [["--reuse", "segments"], ["--min-run", 32], ["--recompute", 0.5]])
def test_segments_need_a_single_engine(others: list[object], option: list[object]) -> None:
    result = call("serve", "absent", *others, *option)
    assert result.exit_code and "requires a single engine" in result.stderr


@pytest.mark.parametrize("option", [["--reuse", "all"], ["--reuse", "segments", "--min-run", 1], ["--recompute", 0.5]])
def test_bad_settings_of_segments(option: list[object]) -> None:
    result = call("serve", "smollm2", *option)
    assert result.exit_code and ("reuse" in result.stderr or "min_run" in result.stderr), result.stderr


@pytest.mark.parametrize("warm_up", ["--warm-up", "--no-warm-up"])
def test_replicas_get_every_option_of_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warm_up: str) -> None:
    """`--load-format` was forgotten once."""
    found: list[ReplicaOptions] = []

    def start(replicas: ReplicaOptions, **_: object) -> None:
        found.append(replicas)
        raise EngineDead("enough")

    monkeypatch.setattr("radixgen.serve.http.worker_backend.start", start)
    values = ENGINE_OPTIONS | {"--max-num-seqs": 5, "--seed": 3, "--profile": tmp_path, "--profile-steps": 3}
    del values["--no-warm-up"]
    given = [warm_up, *(str(part) for option in values.items() for part in option if part is not None)]
    result = call("serve", "absent", "-dp", 2, "--generation-config", "vllm", *given)
    assert "enough" in result.stderr, result.output
    own, replica = parsed("serve", given), parsed("worker", found[0].command("ipc:///nowhere/handshake", 1)[5:])
    assert found[0].count == 2 and replica["model"] == "absent"
    for name in (*options.ENGINE_OPTIONS, *options.PROCESS_OPTIONS, "max_num_seqs"):
        assert own[name] == replica[name], name
        assert own[name] != inspect.signature(serve.serve).parameters[name].default, f"{name} is not tested"


def test_replicas_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[dict[str, object]] = []

    def engine(*_: object, **options: object) -> None:
        found.append(options)
        raise EngineDead("enough")

    monkeypatch.setattr("radixgen.engine.engine.Engine", engine)
    monkeypatch.setattr("radixgen.serve.zmq.launch.run_worker", lambda load, *_, **__: load())
    for more, folder in ([], tmp_path), (["--parent-fd", 0], tmp_path / "1"):
        call("worker", "--engine-index", 1, "--kv-dir", tmp_path, "--kv-dir-size", 0.5, *more)
        assert (found[-1]["kv_dir"], found[-1]["kv_dir_bytes"]) == (folder, 2**29)
    assert len(found) == 2


@pytest.mark.parametrize("size", [0, -1, "nan", 1e9])
def test_bad_sizes_of_a_folder(size: float, tmp_path: Path) -> None:
    result = call("generate", "--model", "absent", "--kv-dir", tmp_path, "--kv-dir-size", size, "a prompt")
    assert result.exit_code == 1 and "kv_dir_size=" in result.stderr and "must be above 0" in result.stderr


def parsed(command: str, arguments: list[str]) -> dict[str, object]:
    """Values of a command's options."""
    group = typer.main.get_command(app)
    return group.commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]


def test_workers_are_waited_for_behind_an_address_only() -> None:
    result = call("serve", "--workers", 2)
    assert result.exit_code == 1 and "workers=2: requires --zmq" in result.stderr


def test_help_texts_are_short() -> None:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            assert len(getattr(option, "help", None) or "") <= 80, f"{command.name} {option.name}"


SHARED_OPTIONS = {
    "load_format", "dtype", "quantization", "kv_cache_dtype", "device", "tp", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "kv_tokens", "kv_offloading_size", "kv_dir", "kv_dir_size", "enforce_eager", "warm_up",
    "seed", "profile", "profile_steps",
}  # fmt: skip


def test_serve_and_worker_have_one_name_for_one_option() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    serve, worker = ({one.name: one for one in commands[name].params} for name in ("serve", "worker"))
    assert serve.keys() & worker.keys() >= SHARED_OPTIONS
    for name in SHARED_OPTIONS:
        ours, theirs = serve[name], worker[name]
        assert (ours.opts, ours.default, ours.help) == (theirs.opts, theirs.default, theirs.help), name
    for name in ("drain_timeout", "stall_timeout"):
        assert serve[name].opts == worker[name].opts, name


def test_a_worker_s_engine_is_as_its_options_say(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[object] = []

    def serve(load: Callable[[], Engine], *_: object, **__: object) -> bool:
        with load() as engine:
            found.extend([engine.max_step_tokens, engine.limits.max_num_seqs, engine.max_model_len])
            engine.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
        return True

    monkeypatch.setattr("radixgen.serve.zmq.launch.run_worker", serve)
    sizes = ("--max-num-batched-tokens", 33, "--max-num-seqs", 5, "--max-model-len", 44, "--kv-tokens", 64)
    options = (*sizes, "--enforce-eager", "--warm-up", "--seed", 3, "--profile", tmp_path)
    result = call("worker", "--model", model, *options)
    assert result.exit_code == 0 and found == [33, 5, 44], result.output
    assert len(list(tmp_path.iterdir())) == 1
    assert "warming up: 1 of " in " ".join(result.stderr.split()), result.stderr
