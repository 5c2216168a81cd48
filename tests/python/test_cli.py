"""`star-attn` as people run it: its output, and one clear line with exit code 2 for bad input."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import click
import pytest

from helpers import HERE
from star_attention import SamplingParams
from star_attention.cli.main import cli
from star_attention.distributed.launch import mpirun_command
from star_attention.models.config import LLAMA_3_1_8B
from test_llm import QUESTION, TEXT


def star_attn(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "star_attention", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "report.txt"
    path.write_text(TEXT)
    return path


ASK = ["ask", "--tokens-per-block", "32", "--block-size", "128", "--max-tokens", "12", "--model"]


def test_help():
    assert "star-attn plan" in star_attn().stdout
    for command in ("plan", "ask", "info"):
        assert star_attn(command, "--help").returncode == 0


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ("--help", "torch transformers"),
        ("eval --help", "torch transformers"),
        ("info --help", "torch transformers star_attention.cli.ask"),
        ("plan --help", "torch transformers star_attention.cli.ask"),
        ("plan --context 1M --ranks 4", "torch transformers star_attention.cli.evals"),
    ],
)
def test_only_what_is_used_is_imported(options, absent):
    code = (
        "import atexit, sys\n"
        "from star_attention.cli import main\n"
        f"atexit.register(lambda: print([m for m in {absent.split()} if m in sys.modules]))\n"
        "main.main()\n"
    )
    command = [sys.executable, "-c", code, *options.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait(before, after):
    """From Python as from the command line, before torch is loaded, unless told otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if before:
        environment["OMP_WAIT_POLICY"] = before
    code = "import star_attention, os, sys; print(os.environ['OMP_WAIT_POLICY'], *sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    policy, *modules = run.stdout.split()
    assert policy == after
    assert "torch" not in modules


def test_the_program():
    (program,) = importlib.metadata.entry_points(group="console_scripts", name="star-attn")
    assert callable(program.load())


def test_plan(tmp_path):
    picture = tmp_path / "plan.png"
    run = star_attn(
        "plan", "--context", "131072", "--block-size", "32K", "--ranks", "8", "--plot", picture
    )
    assert run.returncode == 0, run.stderr
    assert "131,072 tokens in 4 blocks of 32,768" in run.stdout
    assert "all ranks compute blocks 0 to 3 in slices" in run.stdout
    assert re.search(r"Predicted: star \d.*, ring \d.*, dense \d", run.stdout)
    assert picture.stat().st_size > 10_000
    as_json = json.loads(star_attn("plan", "--context", "1M", "--ranks", "2", "--json").stdout)
    assert as_json["context_len"] == 1 << 20
    assert [block["rank"] for block in as_json["blocks"]] == [None, 0, 1, None]
    assert as_json["spans"][-1]["sees"] == [[0, 1 << 18], [3 << 18, 1 << 20]]
    assert {part["rank"] for part in as_json["parts"]} == {0, 1}
    # Half of the first block, and of the last one what is in front of a late slice.
    half = LLAMA_3_1_8B.kv_bytes(1 << 17, 2)
    assert all(half <= rank["received_bytes"] <= 2 * half for rank in as_json["ranks"])
    assert as_json["predicted"]["star"]["seconds"] < as_json["predicted"]["ring"]["seconds"]
    slow = json.loads(
        star_attn("plan", "--context", "1M", "--ranks", 2, "--gemm-tflops", "1", "--json").stdout
    )
    assert slow["rates"]["gemm_tflops"] == 1
    assert slow["predicted"]["star"]["seconds"] > 10 * as_json["predicted"]["star"]["seconds"]


def test_plan_over_a_slow_network():
    def predicted(*options):
        command = ("plan", "--context", "128K", "--block-size", "32K", "--ranks", "4", *options)
        as_json = json.loads(star_attn(*command, "--json").stdout)
        received = max(rank["received_bytes"] for rank in as_json["ranks"])
        return as_json["predicted"]["star"], received, star_attn(*command).stdout

    fast, received, _ = predicted()
    slow, same, printed = predicted("--link-gbs", "10")
    assert received == same
    # All but what the projections hide comes on top of the computation, which stays.
    assert 0.8 * received / 10e9 < slow["exposed_seconds"] < 1.2 * received / 10e9
    assert slow["seconds"] - slow["exposed_seconds"] == pytest.approx(
        fast["seconds"] - fast["exposed_seconds"]
    )
    shown = re.search(r"\((\S+) s of the first for what\s+arrives\)", printed)
    assert float(shown[1]) == pytest.approx(slow["exposed_seconds"], rel=0.01)
    alone, received, _ = predicted("--link-gbs", "10", "--anchor-mode", "local")
    assert received == alone["exposed_seconds"] == 0


def test_the_papers_setting(report, tiny_chat_model):
    """By one flag, on any number of ranks; what contradicts it is refused."""
    plan = ("plan", "--context", "64K", "--ranks", 8, "--preset", "paper")
    as_json = json.loads(star_attn(*plan, "--json").stdout)
    assert [as_json[name] for name in ("block_size", "anchor_size")] == [16384, 16384]
    for option in ("--block-size", "--anchor-size", "--selected-pages"):
        message = f"{option} does nothing with --preset paper, which sets it: leave it away"
        check_refusal(star_attn(*plan, option, 128), message)
    ask = ["ask", "--model", tiny_chat_model, "--context-file", report, "--question", QUESTION]
    ask += ["--tokens-per-block", 32, "--max-tokens", 2, "--preset", "paper", "--json"]
    asked = json.loads(star_attn(*ask).stdout)["plan"]
    quarter = -(-asked["context_len"] // 128) * 32
    assert [asked[name] for name in ("block_size", "anchor_size")] == [quarter, quarter]


def test_info():
    run = star_attn("info", env={**os.environ, "COLUMNS": "80"})
    assert run.returncode == 0
    assert "torch" in run.stdout
    assert "transformers" not in run.stdout
    assert run.stdout.count("\n") <= 24
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert "transformers" in star_attn("info", "--verbose").stdout
    found = json.loads(star_attn("info", "--json").stdout)
    assert found["mpirun"]["found"]
    assert found["transformers"]["found"]


def test_info_counts_gpus(tmp_path):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\ncase $1 in *compute_cap) echo 9.0; echo 9.0; echo 8.0; exit;; esac\n"
        "echo 'H9, 1.2'\necho 'H9, 1.2'\necho 'A1, 1.2'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = json.loads(star_attn("info", "--json", env={**os.environ, "PATH": path}).stdout)
    assert found["GPU"]["found"] == "2 \u00d7 H9, 1.2; 1 \u00d7 A1, 1.2"
    assert found["FP8"]["found"] == "no: not all GPUs are of compute capability 8.9 or newer"


def test_ask_streams_an_answer_and_reports(report):
    run = star_attn(*ASK, "smollm2", "--context-file", report, "--question", QUESTION)
    assert run.returncode == 0, run.stderr
    assert "Tomasz" in run.stdout
    assert "phase 1" in run.stderr
    assert "generated tokens" in run.stderr
    assert re.search(r"the model was loaded in\s+\d+\.\d s", run.stderr)


@pytest.mark.parametrize("attention", ["dense", "ring"])
def test_exact_methods_over_ranks(report, attention):
    options = ["--ranks", 2, "--oversubscribe", "--attention", attention, "--json"]
    command = ["ask", "--tokens-per-block", "32", "--max-tokens", "12", "--model", "smollm2"]
    command += ["--context-file", report, "--question", QUESTION]
    run = star_attn(*command, *options)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert "Tomasz" in result["answers"][0]["text"]
    assert all(rank["kept_tokens"] > 0 for rank in result["plan"]["ranks"])
    assert all(rank["received_bytes"] > 0 for rank in result["plan"]["ranks"])


def test_ask_over_ranks_from_standard_input(smollm2_folder):
    questions = ["--question", QUESTION, "--question", "When does it close?"]
    options = ["--ranks", 2, "--oversubscribe", "--json"]
    run = star_attn(*ASK, smollm2_folder, "--context-file", "-", *questions, *options, input=TEXT)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert [answer["question"] for answer in result["answers"]] == [QUESTION, "When does it close?"]
    assert "Tomasz" in result["answers"][0]["text"]
    assert len(result["ranks"]) == 2
    assert all(rank["peak_memory_bytes"] > 1e8 for rank in result["ranks"])
    assert all(0 < rank["load_seconds"] < 300 for rank in result["ranks"])


def test_questions_of_a_file_and_answers_alone(tmp_path, report, tiny_chat_model):
    (tmp_path / "questions").write_text(f"\ufeff{QUESTION}\n\n  \nWhen does it close?\n", "utf-8")
    ask = [*ASK, tiny_chat_model, "--context-file", report]
    told = star_attn(*ask, "--question", "Why?", "--question-file", tmp_path / "questions")
    assert told.returncode == 0, told.stderr
    places = [told.stdout.index(f"{q}\n") for q in ("Why?", QUESTION, "When does it close?")]
    assert places == sorted(places)
    piped = f"{QUESTION}\nWhen does it close?\n"
    result = star_attn(*ask, "--question-file", "-", "--json", input=piped)
    answers = json.loads(result.stdout)["answers"]
    assert [answer["question"] for answer in answers] == piped.splitlines()
    quiet = star_attn(*ask, "--question-file", "-", "--quiet", input=piped)
    assert quiet.stdout == "".join(answer["text"] + "\n" for answer in answers)
    assert quiet.stderr == ""
    over_ranks = star_attn(
        *ask, "--question-file", "-", "--quiet", "--ranks", 2, "--oversubscribe", input=piped
    )
    assert over_ranks.stdout == quiet.stdout


def test_progress_without_a_terminal(report, tiny_chat_model):
    code = (
        "from star_attention.cli import main, terminal\nterminal._LINE_SECONDS = 0.0\nmain.main()\n"
    )
    ask = [*ASK, tiny_chat_model, "--context-file", report, "--question", QUESTION]
    command = [sys.executable, "-c", code, *map(str, ask)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    shares = [int(share) for share in re.findall(r"star-attn: phase 1: (\d+)%", run.stderr)]
    assert len(shares) > 2
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "phase 1:" not in run.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_saved_contexts(tmp_path, report, smollm2_folder, ranks):
    ask = ["ask", "--tokens-per-block", 32, "--max-tokens", 8, "--model", smollm2_folder]
    ask += ["--question", QUESTION, "--json", "--ranks", ranks, "--oversubscribe"]
    kept = tmp_path / "kept"
    read = star_attn(*ask, "--context-file", report, "--block-size", 128, "--save-context", kept)
    saved = json.loads(read.stdout)
    loaded = json.loads(star_attn(*ask, "--load-context", kept).stdout)
    assert loaded["answers"] == saved["answers"]
    assert loaded["plan"]["parts"] == saved["plan"]["parts"]
    assert all(rank["phases"]["context"]["tokens"] for rank in saved["ranks"])
    assert not any(rank["phases"]["context"]["tokens"] for rank in loaded["ranks"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give --context-file or --load-context, one of them"),
        ("--load-context KEPT --context-file TEXT", "give --context-file or --load-context, one"),
        ("--load-context KEPT", "no context there: --save-context makes one"),
        ("--load-context KEPT --block-size 128", "--block-size does nothing with --load-context"),
        ("--load-context KEPT --preset paper", "--preset does nothing with --load-context"),
        ("--load-context KEPT --selected-pages 2", "--selected-pages does nothing with --load-con"),
        ("--load-context KEPT --system Hi", "--system does nothing with --load-context"),
        ("--load-context KEPT --save-context KEPT", "--save-context does nothing with"),
        ("--context-file TEXT --save-context /proc/a", "/proc/a/contexts cannot be written"),
        (
            "--context-file TEXT --attention ring --save-context KEPT",
            "--save-context does nothing with --attention ring, whose KV is kept nowhere",
        ),
        ("--context-file - --question-file -", "standard input has one text: give - to one"),
        ("--context-file - --context-file -", "--context-file - can be given once"),
        ("--context-file TEXT --question-file /nothing", "--question-file /nothing cannot be read"),
        ("--context-file TEXT --quiet --json", "--quiet does nothing with --json"),
    ],
)
def test_options_of_contexts_and_questions(tmp_path, report, tiny_chat_model, options, message):
    options = options.replace("KEPT", str(tmp_path / "kept")).replace("TEXT", str(report))
    ask = ["ask", "--model", tiny_chat_model, "--question", "Why?", *options.split()]
    check_refusal(star_attn(*ask, input="text"), message)
    assert not (tmp_path / "kept").exists()


def test_no_question_at_all(report, tiny_chat_model):
    ask = ["ask", "--model", tiny_chat_model, "--context-file", report]
    check_refusal(star_attn(*ask), "there is no question: give --question or --question-file")


def test_log_probabilities_and_penalties(report, tiny_chat_model):
    def answer(*options):
        ask = [*ASK, tiny_chat_model, "--context-file", report, "--question", QUESTION, "--json"]
        return json.loads(star_attn(*ask, *options).stdout)["answers"][0]

    plain = answer()
    told = answer("--logprobs", 2)
    assert plain["logprobs"] is None
    assert told["token_ids"] == plain["token_ids"]
    assert [each["token_id"] for each in told["logprobs"]] == told["token_ids"]
    for each in told["logprobs"]:
        likeliest = {name: each[name] for name in ("token_id", "text", "logprob")}
        assert each["top"][0] == likeliest
        assert len(each["top"]) == 2
    penalised = answer("--repetition-penalty", 5, "--frequency-penalty", 2)
    assert penalised["token_ids"] != plain["token_ids"]


def test_what_mpirun_would_take_for_its_own(tmp_path, tiny_chat_model):
    """And a text that can be read only once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(TEXT,))
    writer.start()
    ask = [*ASK, tiny_chat_model, "--context-file", pipe, "--question", ":", "--stop", ":"]
    run = star_attn(*ask, "--ranks", 2, "--oversubscribe", "--json")
    writer.join()
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["answers"][0]["question"] == ":"
    assert result["plan"]["num_ranks"] == 2


def test_only_rank_0_has_options(report, tiny_chat_model):
    """What another rank is started with does not matter."""
    ask = [sys.executable, "-m", "star_attention", *ASK, tiny_chat_model]
    question = ["--context-file", report, "--question", QUESTION]
    other = ["-n", 1, *ask, "--context-file", "/nothing", "--question", "", "--max-tokens", 0]
    command = [*mpirun_command(1, oversubscribe=True), *ask, *question, "--json", ":", *other]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)["ranks"]) == 2


def test_phase_2_traffic_does_not_grow_with_the_context(tmp_path, tiny_chat_model):
    """Per token, layer and peer: one float32 output and LSE per query head."""
    path = tmp_path / "text.txt"
    sent = []
    for repeats in (4, 12):
        path.write_text(TEXT * repeats)
        ask = [*ASK, tiny_chat_model, "--context-file", path, "--question", QUESTION, "--json"]
        result = json.loads(star_attn(*ask, "--ranks", 2, "--oversubscribe").stdout)
        phases = result["ranks"][1]["phases"]
        sent.append(phases["decode"]["traffic"]["sent"] / phases["decode"]["tokens"])
        assert result["plan"]["context_len"] > 800 * repeats / 4
    assert sent == [3 * 4 * (16 + 1) * 4] * 2


BAD_OPTIONS = {
    "--block-size 100": "block size 100 is not a multiple of the page of 32 tokens",
    "--block-size 64 --anchor-size 128": "anchor size is 128: use 0 to 64",
    "--block-size many": "'many' is not a number of tokens",
    "--anchor-mode none": "'none' is not one of 'recompute', 'local', 'broadcast'",
    "--attention sparse": "'sparse' is not one of 'star', 'ring', 'dense'",
    "--kv-placement head": "'head' is not one of 'tail', 'round_robin'",
    "--dtype int8": "'int8' is not one of",
    "--device cuda --dtype float32": "with --device cuda: use bfloat16 or float16",
    "--device cuda": "torch finds no GPU here",
    "--ranks 0": "0 is not in the range x>=1",
    "--ranks 999": "--ranks is 999, but there are",
    "--model /nothing/here": "--model /nothing/here: no such folder or file",
    "--temperature -1": "temperature is -1.0",
    "--temperature nan": "temperature is nan",
    "--kv-cache-gib nan": "nan is not",
    "--kv-cache-gib inf": "inf is not a finite number",
    "--kv-cache-gib 0": "0.0 is not in the range x>0",
    "--attention dense --block-size 64": "--block-size does nothing with --attention dense",
    "--attention dense": "--block-size does nothing with --attention dense",
    "--attention ring --anchor-mode local": "--block-size does nothing with --attention ring",
    "--attention dense --preset paper": "--preset does nothing with --attention dense",
    "--preset paper": "--block-size does nothing with --preset paper, which sets it: leave it away",
    "--preset fast": "'fast' is not 'paper'",
    "--merge nccl": "--merge does nothing with --device cpu: leave it away",
    "--top-k 5": "--top-k does nothing with --temperature 0: leave it away",
    "--seed 5": "--seed does nothing with --temperature 0",
    "--min-p 0.5": "--min-p does nothing with --temperature 0",
    "--temperature 1 --min-p 2": "min_p is 2.0: use 0 (all) to 1",
    "--repetition-penalty 0": "repetition_penalty is 0.0: use more than 0",
    "--presence-penalty 3": "presence_penalty is 3.0: use -2 to 2",
    "--frequency-penalty nan": "frequency_penalty is nan",
    "--logprobs 2": "--logprobs does nothing without --json: leave it away",
    "--template none --system Hi": "--system needs a chat template, which is not used here",
    "--question \udcff": "--question is not UTF-8 text",
    "--stop \udcff": "--stop is not UTF-8 text",
    "--system \udcff": "--system is not UTF-8 text",
    "--model \udcff": "no such folder or file",
    "--top-p 2": "top_p is 2.0",
    "--max-tokens 0": "max_tokens is 0",
    "--template jinja": "'jinja' is not one of",
    "--context-file /nothing": "--context-file /nothing cannot be read: No such file",
    "--context-file /": "--context-file / cannot be read: Is a directory",
    "--colour red": "No such option",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(report, tiny_chat_model, options):
    if options == "--device cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    ask = [*ASK, tiny_chat_model, "--context-file", report, "--question", QUESTION]
    check_refusal(star_attn(*ask, *options.split()), BAD_OPTIONS[options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--disk-cache-gib 3",
            "--disk-cache-gib does nothing without --context-dir: leave it away",
        ),
        ("--attention dense --block-size 128", "--block-size does nothing with --attention dense"),
        ("--preset paper --anchor-size 0", "--anchor-size does nothing with --preset paper"),
        ("--max-gap nan", "nan is not a finite number"),
        ("--host-cache-gib inf", "inf is not a finite number"),
    ],
)
def test_bad_options_of_the_server(tiny_chat_model, options, message):
    check_refusal(star_attn("serve", "--model", tiny_chat_model, *options.split()), message)


def check_refusal(run, message):
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("star-attn: error: "), run.stderr
    assert message in run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2", "--oversubscribe"]], ids=["alone", "ranks"])
@pytest.mark.parametrize(
    ("content", "question", "message"),
    [
        (b"", QUESTION, "is empty"),
        (b" \n\n", QUESTION, "is empty"),
        (b"abc\x00def", QUESTION, "is binary"),
        (b"\xff\xfe\x00abc", QUESTION, "is not UTF-8 text"),
        (b"a text", "", "--question is empty"),
        (b"a text", "why " * 9000, "a question has"),
        (b"why " * 9000, QUESTION, "tokens, the model was made for 2048: use a shorter text"),
    ],
    ids=["empty", "blank", "binary", "latin", "no-question", "long-question", "strict"],
)
def test_bad_texts(tmp_path, tiny_chat_model, content, question, message, ranks):
    path = tmp_path / "text"
    path.write_bytes(content)
    ask = [
        *ASK,
        tiny_chat_model,
        "--strict",
        "--context-file",
        path,
        "--question",
        question,
        *ranks,
    ]
    check_refusal(star_attn(*ask), message)


def test_long_context_is_a_warning(tmp_path, tiny_chat_model):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    run = star_attn(*ASK, tiny_chat_model, "--context-file", path, "--question", QUESTION)
    assert run.returncode == 0, run.stderr
    assert "star-attn: warning: context have" in run.stderr
    assert "made for 2048" in run.stderr


@pytest.mark.parametrize(
    "command", ["ask --context-file REPORT --question Why?", "plan --context 4K", "serve"]
)
def test_no_model_at_all(report, command):
    run = star_attn(*command.replace("REPORT", str(report)).split(), "--model", "")
    check_refusal(run, "--model is empty: name a folder")


def test_byte_order_marks_are_no_text(tmp_path, tiny_chat_model):
    contexts = []
    for mark in ("", "\ufeff"):
        (tmp_path / "text").write_text(mark + TEXT, "utf-8")
        ask = [*ASK, tiny_chat_model, "--context-file", tmp_path / "text", "--question", QUESTION]
        result = json.loads(star_attn(*ask, "--json").stdout)
        contexts.append((result["plan"]["context_len"], result["answers"][0]["token_ids"]))
    assert contexts[0] == contexts[1]


def test_system_messages_and_control_tokens(tmp_path, tiny_chat_model):
    (tmp_path / "text").write_text(TEXT + "<|end|>")
    ask = [*ASK, tiny_chat_model, "--context-file", tmp_path / "text", "--question", QUESTION]
    lengths = [
        json.loads(star_attn(*ask, "--json", *options).stdout)["plan"]["context_len"]
        for options in ([], ["--allow-special"], ["--system", "Be brief."])
    ]
    assert lengths[1] < lengths[0] < lengths[2]


@pytest.mark.parametrize(
    "command", ["--help", "plan --context 128K", "info --json", "ask", "ranks"]
)
def test_output_that_cannot_be_written(report, tiny_chat_model, command):
    command = command.split()
    if command[0] in ("ask", "ranks"):
        ask = [*ASK, tiny_chat_model, "--context-file", report, "--question", QUESTION, "--json"]
        command = [*ask, "--ranks", 2] if command == ["ranks"] else ask
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "star_attention", *map(str, command)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    message = "star-attn: error: the output cannot be read or written: No space left on device\n"
    assert (run.returncode, run.stderr) == (2, message)


def test_a_reader_that_goes_away():
    plan = f"{sys.executable} -m star_attention plan --context 1M --block-size 1K --json"
    run = subprocess.run(f"{plan} | true", shell=True, capture_output=True, text=True, check=False)
    assert run.stderr == ""


def all_commands(group=cli, *names):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from all_commands(command, *names, name)
        else:
            yield (*names, name), command


@pytest.mark.parametrize("names", [pytest.param(n, id=" ".join(n)) for n, _ in all_commands()])
def test_options_have_two_spellings(names):
    """With dashes and with underscores; what they are given stays as it is."""
    command = dict(all_commands())[names]
    context = click.Context(command, parent=click.Context(cli, **cli.context_settings))
    spelled = 0
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        value = [] if option.is_flag or option.count else ["a_b-c"]
        for name in (*option.opts, *option.secondary_opts):
            for spelling in (name, "--" + name[2:].replace("-", "_"), name.replace("_", "-")):
                found, left, _ = command.make_parser(context).parse_args([spelling, *value])
                assert option.name in found, spelling
                assert left == []
                assert not value or found[option.name] in ("a_b-c", ["a_b-c"])
                spelled += 1
        if isinstance(option.type, click.Choice):
            for choice in option.type.choices:
                assert option.type.convert(choice, option, context) == choice
                with pytest.raises(click.BadParameter):
                    option.type.convert(f"{choice}_-", option, context)
    assert spelled or names == ("trtllm", "model-file")


PAGE = (HERE.parents[1] / "docs" / "command_line.md").read_text()


def test_what_the_page_of_the_command_line_names_is_there():
    commands = dict(all_commands())
    for name in re.findall(r"^## (ask|chat)$", PAGE, re.MULTILINE):
        section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        known = {opt for param in commands[name,].params for opt in param.opts}
        # Of somebody else: pip's, and the server's.
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section))
        assert named <= known | {"--context-dir"}, name
    for name in re.findall(r"`star-attn (\w+)`", PAGE):
        assert any(name == each[0] for each in commands), name
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (HERE.parents[1] / "docs" / target).exists(), target


def test_steps_of_sampling_are_in_the_order_of_the_page():
    """And what is off is the default."""
    table = PAGE.partition("| step |")[2]
    steps = re.findall(r"^\| `(\w+)` \| .* \| (\S*) ?\|$", table, re.MULTILINE)
    for name, off in steps:
        if off:
            assert getattr(SamplingParams(), name) == float(off)
    order = ["repetition_penalty", "frequency_penalty", "presence_penalty", "temperature"]
    assert [name for name, _ in steps] == [*order, "min_p", "top_k", "top_p"]


def test_values_keep_their_spelling(report):
    plan = star_attn("plan", "--context", "4K", "--anchor_mode", "local", "--tokens_per-block=64")
    assert plan.returncode == 0, plan.stderr
    ask = ["ask", "--model", "a_b", "--context_file", report, "--question", "--stop_it"]
    check_refusal(star_attn(*ask), "--model a_b: no such folder or file")
    check_refusal(star_attn(*ask, "--kv_placement", "round-robin"), "'round-robin' is not one of")


def test_missing_weights(tmp_path, report):
    ask = ["--context-file", report, "--question", QUESTION]
    check_refusal(star_attn("ask", "--model", tmp_path, *ask), "no *.safetensors and no .gguf file")


def test_export(tmp_path, tiny_chat_model):
    run = star_attn("export", "--model", tiny_chat_model, "--output-dir", tmp_path / "graph")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "graph" / "model.onnx").exists()
    run = star_attn("export", "--model", tiny_chat_model, "--output-dir", "/proc/graph")
    assert run.returncode == 2
    assert run.stderr.startswith("star-attn: error: --output-dir /proc/graph cannot be written")


def test_random_weights(tmp_path, report, tiny_chat_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_chat_model, folder)
    (folder / "model.safetensors").unlink()
    ask = [*ASK, folder, "--context-file", report, "--question", QUESTION]
    assert "no *.safetensors" in star_attn(*ask).stderr
    run = star_attn(*ask, "--load-format", "dummy", "--json", "--ranks", 2)
    assert len(json.loads(run.stdout)["answers"][0]["token_ids"]) == 12, run.stderr


def test_missing_mpirun(tmp_path, report):
    """With a Python that has no mpirun beside it."""
    bare = tmp_path / "python"
    bare.symlink_to(sys.executable)
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ask = [*ASK, "smollm2", "--context-file", report, "--question", QUESTION]
    run = subprocess.run(
        [bare, "-m", "star_attention", *ask, "--ranks", "2", "--oversubscribe"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    check_refusal(run, "--ranks 2 needs mpirun")
