"""TensorRT engines as far as a machine without TensorRT can tell: limits, profiles, the folder, the
command line, and that none of it needs torch to run."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import load

from helpers import MODELS, save_tiny_model, train_tokenizer
from star_attention.cli import build as trt_cli
from star_attention.cli import main as cli
from star_attention.config import StarConfig
from star_attention.engines.base import Exchange, Pages
from star_attention.engines.loader import division_of
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt import build as trt_build
from star_attention.engines.tensorrt.build import BuildOptions, build_engine, limits_for, profiles
from star_attention.engines.tensorrt.engine import exchange_runs
from star_attention.engines.tensorrt.folder import EngineConfig, EngineLimits
from star_attention.engines.tensorrt.library import LogFile, load_tensorrt
from star_attention.engines.tensorrt.read import read_engine_config
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.models.rotary import rotary_table
from star_attention.models.tokenizer import Tokenizer
from thread_ranks import ThreadRanks


class TensorRt:
    """Stands for star_attention._trt."""

    HAS_CUBLAS = HAS_FP8 = True

    def __init__(self, error=None):
        self.error = error

    def version(self):
        return "8.6.0"

    def build(self, *, onnx, engine, log, **options):
        log("verbose", f"reading {onnx}")
        log("progress", "timing a GEMM")
        if self.error:
            raise RuntimeError(self.error)
        self.options = options
        self.operators = {node.op_type for node in load(onnx, load_external_data=False).graph.node}
        with open(engine, "w") as file:
            file.write("plan")


@pytest.fixture
def tensorrt(monkeypatch):
    trt = TensorRt()
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10 has none
    monkeypatch.setattr(trt_build, "load_tensorrt", lambda: trt)
    monkeypatch.setattr(trt_build, "gpu_of", lambda: ("a GPU", "9.0"))
    return trt


@pytest.fixture
def model(tmp_path):
    sizes = {"vocab_size": 700, "max_position_embeddings": 2048}
    save_tiny_model(tmp_path / "model", head_dim=64, **sizes)
    return train_tokenizer(tmp_path / "model", "llama3")


def test_limits_follow_the_model():
    limits = limits_for(LLAMA_3_1_8B, block_size=16384, max_batch_size=None)
    assert (limits.max_seq_len, limits.max_input_len) == (131072, 130048)
    assert limits.max_num_tokens == 16384
    assert limits_for(LLAMA_3_1_8B).max_num_tokens == 32768
    assert limits_for(LLAMA_3_1_8B, max_seq_len=1 << 20).max_num_tokens == 1 << 18


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_batch_size": 0}, "--max_batch_size is 0: use 1 or more"),
        ({"max_input_len": 4096, "max_seq_len": 4096}, "use a --max_seq_len that leaves room"),
        ({"tokens_per_block": 32}, "--tokens_per_block is 32: use 64 or 128"),
        ({"block_size": 16384, "max_num_tokens": 8192}, "use at least --block_size, 16384"),
        ({"block_size": 1000}, "block size 1000 is not a multiple"),
        ({"block_size": 1024, "anchor_size": 2048}, "anchor size is 2048: use 0 to 1024"),
        ({"cp_size": 0}, "--cp_size is 0"),
    ],
)
def test_limits_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        limits_for(LLAMA_3_1_8B, **given)


def test_profiles():
    limits = EngineLimits(4, 4000, 4096, 1024, 64)
    context, generation = profiles(LLAMA_3_1_8B, limits)
    assert set(context) == set(generation)
    assert context["input_ids"] == ([1], [1024], [1024])
    assert context["page_table"] == ([1, 1], [1, 64], [limits.max_sequences, 64])
    assert generation["cu_seqlens_q"] == ([2], [2], [5])
    assert generation["rotary"] == ([4096, 128],) * 3


def pages(**lists):
    """What goes to, or comes from, each rank: r0=[2, 3], ..."""
    return tuple(Pages(int(rank[1:]), np.array(each)) for rank, each in lists.items())


def test_exchanges_are_cut_alike():
    """Each pair of ranks where either of them has to; no rank cares for the others' pairs."""
    exchanges = [
        [
            Exchange(9, pages(r1=[0, 1, 2, 3, 4], r2=[0, 1, 2, 3, 4]), pages(r2=[8, 9])),
            Exchange(9, pages(r1=[5]), ()),
        ],
        [
            Exchange(0, (), pages(r0=[7, 8, 3, 4, 5], r2=[1, 0])),
            Exchange(0, (), pages(r0=[6])),
        ],
        [
            Exchange(4, pages(r0=[4, 6], r1=[4, 6]), pages(r0=[0, 1, 2, 3, 9])),
            Exchange(4, (), ()),
        ],
    ]
    cut = ThreadRanks(3).run(lambda comm: exchange_runs(exchanges[comm.rank], comm))
    assert cut == [
        ([(1, 0, 2), (1, 2, 4), (2, 0, 4), (2, 4, 1)], [(2, 8, 1), (2, 9, 1)]),
        ([], [(0, 7, 2), (0, 3, 4), (2, 1, 1), (2, 0, 1)]),
        ([(0, 4, 1), (0, 6, 1), (1, 4, 1), (1, 6, 1)], [(0, 0, 4), (0, 9, 1)]),
    ]


@pytest.mark.parametrize("receives", [(), pages(r0=[3])])
def test_exchanges_that_do_not_match(receives):
    exchanges = [Exchange(0, pages(r1=[0, 1]), ())], [Exchange(0, (), receives)]
    message = f"2 pages here are {len(receives)} on rank 1|1 pages here are 2 on rank 0"
    with pytest.raises(ValueError, match=message):
        ThreadRanks(2).run(lambda comm: exchange_runs(exchanges[comm.rank], comm))


def test_folder(tmp_path, tensorrt, model):
    limits = EngineLimits(2, 900, 1024, 512, 64, block_size=256, anchor_size=64)
    steps = []
    folder = tmp_path / "engine"
    written = build_engine(model, folder, limits, BuildOptions(workers=3), steps.append)
    assert "timing a GEMM" in steps
    assert tensorrt.options["workers"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "engine",
        "engine.build.log",
        "model",
    ]
    assert read_engine_config(folder) == written
    assert written.model == cli_config(model)
    assert find_model(str(folder)) == folder
    rope, head_dim = written.model.rope, written.model.head_dim
    table = np.fromfile(folder / "rotary.bin", np.float32).reshape(-1, head_dim)
    expected = rotary_table(rope, head_dim, 1024, torch.device("cpu"))
    np.testing.assert_array_equal(table, expected)
    assert Tokenizer(folder).context_tokens("a fox") == Tokenizer(model).context_tokens("a fox")
    again = build_engine(model, folder, limits)
    assert again.weights_sha256 == written.weights_sha256


@pytest.mark.parametrize(
    ("gemm_plugin", "has_cublas", "operator"),
    [("auto", True, "StarLinear"), ("auto", False, "Gemm"), ("disable", True, "Gemm")],
)
def test_who_computes_projections(tmp_path, tensorrt, model, gemm_plugin, has_cublas, operator):
    tensorrt.HAS_CUBLAS = has_cublas
    limits = EngineLimits(2, 900, 1024, 512, 64)
    build_engine(model, tmp_path / "engine", limits, BuildOptions(gemm_plugin=gemm_plugin))
    assert tensorrt.operators & {"StarLinear", "Gemm"} == {operator}


def test_projections_in_fp8(tmp_path, tensorrt, model):
    limits, options = EngineLimits(2, 900, 1024, 512, 64), BuildOptions(quantization="fp8")
    written = build_engine(model, tmp_path / "engine", limits, options)
    assert {"StarLinearFp8", "StarLinearFp8Add", "StarLinear"} <= tensorrt.operators
    assert written.quantization == "fp8"
    assert read_engine_config(tmp_path / "engine") == written
    assert written.weights_sha256 != build_engine(model, tmp_path / "engine", limits).weights_sha256


@pytest.mark.parametrize(
    ("capability", "has_fp8", "message"),
    [
        ("8.9", True, "needs a GPU of compute capability 9.0 or newer, this one has 8.9"),
        ("12.0", False, "needs cuBLAS 12.9 or newer"),
    ],
)
def test_where_fp8_is_not(monkeypatch, tmp_path, tensorrt, model, capability, has_fp8, message):
    tensorrt.HAS_FP8 = has_fp8
    monkeypatch.setattr(trt_build, "gpu_of", lambda: ("a GPU", capability))
    limits = EngineLimits(2, 900, 1024, 512, 64)
    with pytest.raises(UserError, match=message):
        build_engine(model, tmp_path / "engine", limits, BuildOptions(quantization="fp8"))


def test_fp8_is_of_cublas():
    with pytest.raises(UserError, match="--gemm_plugin is 'disable': with --quantization fp8"):
        BuildOptions(gemm_plugin="disable", quantization="fp8")


def cli_config(model):
    from star_attention.models.checkpoint import open_checkpoint

    return open_checkpoint(model).config


def test_nothing_is_left_of_a_build_that_fails(tmp_path, tensorrt, model):
    tensorrt.error = "node 7: no kernel"
    folder = tmp_path / "engine"
    with pytest.raises(UserError, match=r"node 7: no kernel \(log: .*engine.build.log\)"):
        build_engine(model, folder, limits_for(cli_config(model)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.build.log", "model"]


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("llama", {"head_dim": 96}, "heads have 96 elements, the GPU kernels 64 or 128: use --dev"),
        ("qwen3_moe", {"head_dim": 64}, "mixture of experts, which TensorRT engines do not have"),
    ],
)
def test_models_that_engines_cannot_have(tmp_path, tensorrt, architecture, options, message):
    save_tiny_model(tmp_path / "other", architecture, **options)
    train_tokenizer(tmp_path / "other", "llama3")
    with pytest.raises(UserError, match=message):
        build_engine(tmp_path / "other", tmp_path / "engine", EngineLimits(2, 400, 512, 512, 64))
    assert not (tmp_path / "engine").exists()


def test_rotary_table_of_two_choices(tmp_path, tensorrt):
    """An engine of a longrope model has the rows for short and for long contexts."""
    architecture, overrides = MODELS["phi3-long"]
    rope = {**overrides["rope_parameters"], "short_factor": [1.0] * 24, "long_factor": [4.0] * 24}
    overrides = {**overrides, "rope_parameters": rope, "hidden_size": 256}
    save_tiny_model(tmp_path / "model", architecture, **overrides)
    train_tokenizer(tmp_path / "model", "llama3")
    limits = EngineLimits(2, 400, 512, 512, 64)
    written = build_engine(tmp_path / "model", tmp_path / "engine", limits)
    context, _ = tensorrt.options["profiles"]
    assert context["rotary"] == ([1024, 64],) * 3
    assert (tmp_path / "engine" / "rotary.bin").stat().st_size == 4 * 1024 * 64
    assert read_engine_config(tmp_path / "engine") == written


def test_other_folders_are_not_overwritten(tmp_path, tensorrt, model):
    with pytest.raises(UserError, match="has other files in it: name another folder"):
        build_engine(model, model, limits_for(cli_config(model)))


def engine_folder(tmp_path, quantization=None, **limits):
    limits = EngineLimits(2, 900, 1024, 512, 64, **limits)
    versions = "8.6.0", "a GPU", "9.0", "abc", "0.1"
    config = EngineConfig(LLAMA_3_1_8B, limits, "float16", *versions, quantization)
    (tmp_path / "engine.plan").touch()
    config.write(tmp_path)
    return tmp_path


def test_division_of_an_engine(tmp_path):
    folder = engine_folder(tmp_path, block_size=512, anchor_size=128)
    config = StarConfig(tokens_per_block=64)
    assert division_of(folder, config, EngineOptions()) == StarConfig(512, 128, tokens_per_block=64)
    whole = StarConfig(256, tokens_per_block=64)
    assert division_of(folder, whole, EngineOptions()) == whole
    for options, message in (
        (EngineOptions("cuda", "bfloat16"), "the engine computes in float16: leave it away"),
        (EngineOptions(load_format="dummy"), "an engine has its weights"),
        (EngineOptions(tp=2), "TensorRT engines have no tensor parallelism"),
        (
            EngineOptions(quantization="fp8"),
            "but the engine was built with --quantization none: leave it away",
        ),
    ):
        with pytest.raises(UserError, match=message):
            division_of(folder, config, options)
    with pytest.raises(UserError, match="use --tokens-per-block 64"):
        division_of(folder, StarConfig(), EngineOptions())


def test_quantization_of_an_engine(tmp_path):
    folder, config = engine_folder(tmp_path, "fp8"), StarConfig(tokens_per_block=64)
    for given in ("auto", "fp8"):
        division_of(folder, config, EngineOptions(quantization=given))
    with pytest.raises(UserError, match="is none, but the engine was built with --quantization fp"):
        division_of(folder, config, EngineOptions(quantization="none"))


def test_engines_from_before_there_was_fp8(tmp_path):
    path = engine_folder(tmp_path) / "config.json"
    content = json.loads(path.read_text())
    del content["quantization"]
    path.write_text(json.dumps(content))
    assert read_engine_config(tmp_path).quantization is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{", "config.json cannot be read"),
        (lambda config: json.dumps({}), "is not one that star-attn build of this version wrote"),
        (lambda config: json.dumps({**config, "limits": 1}), "is damaged"),
        (
            lambda config: json.dumps({name: config[name] for name in config if name != "gpu"}),
            r"is damaged \('gpu'\): build the engine again",
        ),
    ],
)
def test_damaged_config(tmp_path, change, message):
    path = engine_folder(tmp_path) / "config.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(UserError, match=message):
        read_engine_config(tmp_path)


def test_command_line(monkeypatch, tmp_path, model, capsys):
    """trtllm-build's names for the options, and sizes as everywhere here."""
    seen = {}

    def stand_in(path, folder, limits, options, on_progress):
        seen.update(path=path, folder=folder, limits=limits, options=options)
        return SimpleNamespace(gpu="a GPU", tensorrt="8.6.0", dtype="float16")

    monkeypatch.setattr(trt_cli, "build_engine", stand_in)
    options = "--max_batch_size 2 --max_input_len 1K --max_seq_len 1280 --max_num_tokens 512"
    sizes = "--tokens_per_block 64 --block_size 256 --anchor_size 64 --cp_size 2 --workers 4"
    command = ["build", "--checkpoint_dir", str(model), "--output_dir", str(tmp_path / "engine")]
    monkeypatch.setattr(sys, "argv", ["star-attn", *command, *options.split(), *sizes.split()])
    cli.main()
    assert seen["limits"] == EngineLimits(2, 1024, 1280, 512, 64, 256, 64, 2)
    assert asdict(seen["options"]) == asdict(BuildOptions(workers=4))
    assert "star-attn ask --engine_dir" in capsys.readouterr().out


def test_log_file(tmp_path):
    progress = []
    log = LogFile(tmp_path / "log", ("error",), progress.append)
    log("info", "nothing")
    log("progress", "step 1")
    assert progress == ["step 1"]
    assert str(log.explain(RuntimeError("bad"))) == "bad"
    log("error", "very bad")
    assert str(log.explain(RuntimeError("bad"))) == f"bad (log: {tmp_path / 'log'})"
    assert "very bad" in log.path.read_text()


@pytest.mark.parametrize("installed", [False, True])
def test_pips_cublas_is_loaded_if_the_loader_finds_none(monkeypatch, tmp_path, installed):
    path = tmp_path / "nvidia/cu13/lib/libcublasLt.so.13"
    path.parent.mkdir(parents=True)
    if installed:
        path.touch()
    loaded = []
    trt = SimpleNamespace(load=lambda folder: None)

    def import_trt(name):
        if not loaded:
            raise ImportError("libcublasLt.so.13: cannot open shared object file: No such file")
        return trt

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", loaded.append)
    monkeypatch.setattr("importlib.import_module", import_trt)
    if installed:
        assert load_tensorrt.__wrapped__() is trt
        assert loaded == [str(path)]
    else:
        with pytest.raises(UserError, match=r"reinstall .*\(libcublasLt\.so\.13: cannot open"):
            load_tensorrt.__wrapped__()


def test_what_was_compiled():
    """Every target compiles where nvcc and TensorRT's headers are; the parser's needs one more."""
    trt = pytest.importorskip("star_attention._trt", exc_type=ImportError)
    assert int(trt.HEADERS_VERSION.split(".")[0]) >= 8
    if not trt.HAS_PARSER:
        pytest.skip(
            f"plugin/onnx_parser.cpp is not compiled: TensorRT {trt.HEADERS_VERSION}'s headers "
            "lack NvOnnxParser.h"
        )


def test_running_an_engine_needs_no_torch():
    """Everything on the way to a session imports where torch is missing."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import star_attention.cli.main, star_attention.llm\n"
        "import star_attention.engines.tensorrt.engine\n"
        "import star_attention.runtime.job, star_attention.models.tokenizer\n"
        "import star_attention.engines.tensorrt.build, star_attention.models.decoder\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
