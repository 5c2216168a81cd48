"""The TensorRT engine's Python, over stand-ins for CuPy and TensorRT: ONNX's reference evaluator
runs the graph, and checks every step's shapes against the profiles."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from engine_steps import ints, step_of
from helpers import forced_logits, save_tiny_model
from star_attention import ops
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess, Traffic
from star_attention.engines.base import Exchange, Limits, Pages
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt import engine as trt_engine
from star_attention.engines.tensorrt.build import profiles
from star_attention.engines.tensorrt.engine import TensorRtEngine
from star_attention.engines.tensorrt.folder import ROTARY, EngineConfig, EngineLimits, write_rotary
from star_attention.engines.tensorrt.onnx import export_graph
from star_attention.errors import UserError
from star_attention.models.checkpoint import open_checkpoint
from star_attention.runtime.leader import lead_together
from star_attention.runtime.orders import Ask, Decode, QuestionPart
from star_attention.runtime.sampling import to_numpy
from test_export import STEPS, StarAttention

PAGE = 64
LIMITS = EngineLimits(3, 500, 512, 256, PAGE)
ADDRESS = 11 << 32
NONE = np.zeros(0, np.int32)
waits = []  # (stream, event)


class Array(np.ndarray):
    data = property(lambda array: SimpleNamespace(ptr=array.ctypes.data))

    def set(self, host):
        self[...] = host


class Stream:
    ptr = 0

    def __init__(self, non_blocking=False):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def synchronize(self):
        pass

    def wait_event(self, event):
        waits.append((self, event))


class Event:
    done = False

    def __init__(self, disable_timing):
        pass

    def record(self, stream):
        self.stream = stream


class Device:
    def __init__(self, number):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


class StepContext(SimpleNamespace):
    prefix = None

    def set_prefix(self, *, scales, kv_dtype, page_table, kv_lens, max_kv_len):
        pool, *arrays = (
            torch.from_numpy(each.view(np.ndarray))
            for each in (self.kv_pool, scales, page_table, kv_lens)
        )
        self.prefix = ops.codes_of(pool, ops.code_dtype(kv_dtype)), *arrays
        self.most = max_kv_len


def quantizer(function):
    """As star_attention._trt has it."""

    def convert(*, kv_pool, scales, dtype, kv_dtype, stream, **lists):
        pool = torch.from_numpy(kv_pool.view(np.ndarray))
        codes = ops.codes_of(pool, ops.code_dtype(kv_dtype))
        lists = (torch.from_numpy(each) for each in lists.values())
        function(pool, codes, torch.from_numpy(scales.view(np.ndarray)), *lists)

    return convert


class Execution:
    def __init__(self, evaluator, profile):
        self.evaluator, self.profile = evaluator, profile
        self.tensors = {}

    def bind(self, name, array):
        self.tensors[name] = array

    def bind_context(self, context):
        self.context = context

    def enqueue(self, stream):
        context = self.context
        pool = torch.from_numpy(context.kv_pool.view(np.ndarray))
        wide = pool.float()  # itself, unless it is of 16 bits
        STEPS[ADDRESS] = wide, context.causal, context.prefix
        feeds = {name: np.array(array) for name, array in self.tensors.items()}
        logits = feeds.pop("logits")
        for name, (least, _, most) in self.profile.items():
            shape = feeds[name].shape
            assert np.all(np.less_equal(least, shape) & np.less_equal(shape, most)), (name, shape)
        feeds["runtime_context"] = np.array([ADDRESS]).view(np.int32)
        self.tensors["logits"][...] = self.evaluator.run(None, feeds)[0]
        slots = np.asarray(self.tensors["slot_mapping"])
        stored = np.unique(slots[slots >= 0] // PAGE)
        pool[:, stored] = wide[:, stored].to(pool.dtype)
        assert self.tensors["logits"].shape == logits.shape

    def capture(self, stream):
        return SimpleNamespace(launch=self.enqueue)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def make_engine(tmp_path, monkeypatch, model):
    waits.clear()
    graph = export_graph(model, tmp_path / "graph", "float32")
    evaluator = ReferenceEvaluator(str(graph), new_ops=[StarAttention])
    config = open_checkpoint(model).config
    ranges = profiles(config, LIMITS)

    def session(plan, device, log):
        return SimpleNamespace(
            execution=lambda profile: Execution(evaluator, ranges[profile]),
            weight_bytes=1000,
            activation_bytes=100,
        )

    def zeros(shape, dtype):
        return np.zeros(shape, dtype).view(Array)

    trt = SimpleNamespace(
        version=lambda: "8.6.0",
        Session=session,
        StepContext=StepContext,
        quantize_pages=quantizer(ops.quantize_pages),
        dequantize_pages=quantizer(ops.dequantize_pages),
        step_workspace_bytes=lambda **_: 10,
    )
    cupy = SimpleNamespace(
        ndarray=(),  # nothing is one
        empty=zeros,
        asarray=np.asarray,
        uint8=np.uint8,
        uint16=np.float32,  # the elements of the KV pool, which only kernels look at
        int32=np.int32,
        float32=np.float32,
        cuda=SimpleNamespace(
            Stream=Stream,
            Event=Event,
            Device=Device,
            runtime=SimpleNamespace(
                memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size),
            ),
        ),
        get_default_memory_pool=lambda: SimpleNamespace(total_bytes=lambda: 1),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(zeros_pinned=zeros))
    monkeypatch.setattr(trt_engine, "load_tensorrt", lambda: trt)
    monkeypatch.setattr(trt_engine, "gpu_of", lambda device: ("a GPU", "9.0"))
    write_rotary(config, LIMITS.max_seq_len, tmp_path / ROTARY)
    about = EngineConfig(config, LIMITS, "float16", "8.6.0", "a GPU", "9.0", "abc", "0.1")

    def make(kv_dtype="auto"):
        if kv_dtype != "auto":
            cupy.uint16 = np.float16
        engine = TensorRtEngine(tmp_path, about, SingleProcess(), 0, kv_dtype)
        engine.allocate_pool(32)
        return engine

    return make


@pytest.mark.parametrize("mode", ["recompute", "local"])
def test_same_logits_as_torch(engine, model, mode):
    tokens = np.random.default_rng(6).integers(0, 97, 280).astype(np.int32)
    context, question, answer = np.split(tokens, [270, 276])
    logits = []
    for each in (load_engine(model, SingleProcess(), PAGE, EngineOptions()), engine):
        leader, _ = lead_together(each, SingleProcess())
        encoded = leader.encode(context, StarConfig(64, 64, mode, tokens_per_block=PAGE))
        logits.append(forced_logits(leader, encoded, question, answer))
    np.testing.assert_allclose(*logits, atol=2e-5)
    assert engine._graphs.keys() == {1}
    assert engine.graph_steps == len(answer) - 1


def test_several_questions(engine, model):
    """Three take the graph of three, which is the most, not of four."""
    tokens = np.random.default_rng(7).integers(0, 97, 200).astype(np.int32)
    questions = np.split(tokens[190:], [2, 6])
    logits = []
    for each in (load_engine(model, SingleProcess(), PAGE, EngineOptions()), engine):
        leader, _ = lead_together(each, SingleProcess())
        config = StarConfig(64, 64, "local", tokens_per_block=PAGE)
        number = leader.encode(tokens[:190], config).number
        parts = [QuestionPart(i, number, question, 0) for i, question in enumerate(questions)]
        orders = [Ask(tuple(parts))]
        for asked in ((0, 1, 2), (0, 1), (1,), (2, 0, 1), (2,)):
            orders.append(Decode(asked, tuple(i + 5 for i in asked), (0,) * len(asked)))
        logits.append(np.concatenate([to_numpy(leader.execute(order)).copy() for order in orders]))
    np.testing.assert_allclose(*logits, atol=2e-5)
    assert engine._graphs.keys() == {1, 2, 3}
    assert engine.graph_steps == 2


def test_contexts_in_8_bits(make_engine, model):
    """Nearer to the torch engine's, whose pages are of float32 before, than these are to those of
    float32; and steps of several questions."""
    tokens = np.random.default_rng(6).integers(0, 97, 280).astype(np.int32)
    context, question, answer = np.split(tokens, [270, 276])
    found = []
    for kind, make in (("auto", load), ("fp8", load), ("fp8", make_engine)):
        engine = load(model, kind) if make is load else make_engine(kind)
        leader, worker = lead_together(engine, SingleProcess())
        config = StarConfig(64, 64, "local", tokens_per_block=PAGE, kv_dtype=kind)
        encoded = leader.encode(context, config)
        logits = [forced_logits(leader, encoded, question, answer)]
        parts = [QuestionPart(i, encoded.number, tokens[i : i + 3], 0) for i in range(3)]
        for order in (Ask(tuple(parts)), Decode((0, 1), (7, 8), (0, 0)), Decode((2,), (9,), (0,))):
            logits.append(to_numpy(leader.execute(order)).copy())
        found.append(np.concatenate(logits))
    whole, theirs, ours = found
    of_8_bits = np.linalg.norm(theirs - whole, axis=1)
    assert (np.linalg.norm(ours - theirs, axis=1) < 0.8 * of_8_bits).all()
    assert np.linalg.norm(ours - theirs) < 0.4 * np.linalg.norm(of_8_bits)
    assert engine.graph_steps > 3
    assert worker.pool.pages_in_use == 5 + 3  # a page of each block, and of each question


def load(model, kv_dtype):
    return load_engine(model, SingleProcess(), PAGE, EngineOptions(kv_dtype=kv_dtype))


def test_kept_pages_in_8_bits(make_engine):
    """What was written is read again, codes and scales."""
    engine = make_engine("fp8")
    assert engine.kept_page_bytes == engine.page_bytes // 2 + 2 * 2 * 4  # with scales
    pages, random = [5, 6, 9, 2], np.random.default_rng(8)
    given = random.integers(0, 256, (4, engine.kept_page_bytes), np.uint8)
    engine.write_layer(1, pages, given)
    out = np.zeros_like(given)
    engine.read_layer(1, pages, out)
    np.testing.assert_array_equal(out, given)
    in_pool = engine._codes.view(np.ndarray)[1, pages].reshape(4, -1)
    np.testing.assert_array_equal(in_pool, given.reshape(-1)[: in_pool.size].reshape(4, -1))


def test_a_rank_without_blocks(engine):
    logits = engine.step(NONE, NONE, step_of(exchanges=(Exchange(0, (), ()),)), NONE)
    assert logits.shape == (0, 97)


class Rank:
    """The second of three, as an engine sees its communicator. `sends` and `receives` are what
    the others have for it, by rank."""

    rank, size = 1, 3
    rank_merge = None

    def __init__(self, **others):
        self.nccl, self.traffic, self._others = object(), Traffic(), others

    def gather_objects(self, mine):
        self.given = mine
        return [self._others["first"], mine, self._others["last"]]

    def check(self):
        pass


@pytest.mark.parametrize(("rows", "wanted"), [(0, 0), (70, 0), (70, 1)])
def test_exchanges(engine, rows, wanted):
    """In every layer, whether or not the last one attends, and also where there is nothing to
    compute."""
    made = []

    class PageExchange(SimpleNamespace):
        def wait_seconds(self):
            return 0.25

    def make(nccl, sends, receives):
        made.append(PageExchange(nccl=nccl, sends=sends, receives=receives))
        return made[-1]

    engine._trt.PageExchange = make
    engine._comm = comm = Rank(
        first=({1: ints(0, 1, 2)}, {1: ints(9, 10, 11)}), last=({1: ints(3)}, {1: ints(4, 5, 6)})
    )
    sent, arrived = ints(7, 8, 4), (Pages(0, ints(0, 1, 3)), Pages(2, ints(5)))
    step = step_of(
        *[([0, 1, 3, 5, 7, 8, 4], 192, rows)] * (rows > 0),
        page=PAGE,
        exchanges=(Exchange(rows, (Pages(0, sent), Pages(2, sent)), arrived),),
    )
    tokens = np.arange(rows, dtype=np.int32)
    engine.step(tokens, tokens, step, tokens[:wanted])
    [exchange] = made
    assert exchange.nccl is comm.nccl
    assert exchange.sends == [(0, 7, 2), (0, 4, 1), (2, 7, 2), (2, 4, 1)]
    assert exchange.receives == [(0, 0, 2), (0, 3, 1), (2, 5, 1)]
    assert engine._execution.context.exchange is exchange
    assert engine.wait_seconds == 0.25
    each = engine.page_bytes * engine.config.num_layers
    assert comm.traffic == Traffic(6 * each, 4 * each)

    engine.step(tokens, tokens, step_of(*[([9, 10], 0, rows)] * (rows > 0), page=PAGE), NONE)
    assert engine._execution.context.exchange is None
    assert engine.wait_seconds == 0.25
    assert comm.traffic == Traffic(6 * each, 4 * each)


def test_no_exchanges_where_ranks_share_a_gpu(engine):
    assert engine.has_exchanges
    engine.has_exchanges = False
    with pytest.raises(UserError, match="use as many GPUs as ranks"):
        engine.step(NONE, NONE, step_of(exchanges=(Exchange(0, (), ()),)), NONE)


def test_fp8_contexts_of_keys_with_a_bias_are_refused(tmp_path, monkeypatch):
    for name in ("require_cupy", "load_tensorrt", "load_plugins"):
        monkeypatch.setattr(trt_engine, name, lambda *_: None)
    model, limits = SimpleNamespace(qkv_bias=True), SimpleNamespace(cp_size=None)
    config = SimpleNamespace(weights_sha256="", tensorrt="", limits=limits, model=model)
    monkeypatch.setattr(trt_engine, "read_engine_config", lambda folder: config)
    options = EngineOptions("cuda", kv_dtype="fp8")
    with pytest.raises(UserError, match="--kv-dtype is fp8, but the model adds a bias to its keys"):
        trt_engine.load_trt_engine(tmp_path, SingleProcess(), options)


def test_more_than_the_engine_was_built_for(engine):
    leader, _ = lead_together(engine, SingleProcess())
    with pytest.raises(UserError, match="no ring attention: use --attention star or dense"):
        leader.encode(np.zeros(400, np.int32), StarConfig(attention="ring", tokens_per_block=PAGE))
    with pytest.raises(UserError, match="takes 501 tokens, the engine was built for --max_input"):
        leader.encode(np.zeros(501, np.int32), StarConfig(tokens_per_block=PAGE))
    # What is longer than a pass takes several.
    dense = StarConfig(attention="dense", tokens_per_block=PAGE)
    assert leader.encode(np.zeros(400, np.int32), dense).is_ready


@pytest.mark.parametrize(
    ("count", "rows", "message"),
    [
        (257, 0, "a step of 257 tokens, the engine takes 256"),
        (1, 0, "position 512"),
        (1, 129, "a step of 129 rows of logits, the engine takes 128"),
    ],
)
def test_steps_beyond_the_limits(engine, count, rows, message):
    """Bugs: no order asks for them."""
    positions = np.full(count, 512 if "position" in message else 0, np.int32)
    message = message.replace("position 512", "a step of 513 rotary rows, the engine takes 512")
    step = step_of((list(range(8)), 0, count), page=PAGE)
    with pytest.raises(ValueError, match=message):
        engine.step(np.zeros(count, np.int32), positions, step, np.zeros(rows, np.int32))


def test_too_many_questions(engine):
    step = step_of(*[([0], 5, 1)] * 4, page=PAGE)
    four = np.arange(4, dtype=np.int32)
    with pytest.raises(ValueError, match="a step of 4 sequences, the engine takes 3"):
        engine.step(four, four, step, four)


def test_limits(engine):
    assert engine.limits == Limits(
        pages=32,
        pass_tokens=256,
        pass_sequences=4,
        question_tokens=256,
        questions=3,
        input_len=500,
        seq_len=512,
    )
    engine.reserve_pages(32)
    with pytest.raises(ValueError, match="33 pages are asked for, there are 32"):
        engine.reserve_pages(33)
    engine.reserve_positions(512)
    with pytest.raises(ValueError, match="513 positions are asked for, the engine has 512"):
        engine.reserve_positions(513)


def test_copies_of_pages(engine):
    """What was computed comes before a copy, and only steps that it concerns come behind it."""
    for pages in ([3, 4, 9], [0]):
        out = np.zeros((len(pages), engine.page_bytes), np.uint8)
        given = np.random.default_rng(8).integers(0, 256, out.shape, np.uint8)
        engine.write_layer(1, pages, given)
        engine.read_layer(1, pages, out)
        np.testing.assert_array_equal(out, given)
        in_pool = engine._pool.view(np.ndarray)[1, pages].view(np.uint8).reshape(out.shape)
        np.testing.assert_array_equal(in_pool, given)
    assert {stream for stream, _ in waits} == {engine._copies._stream}
    assert {event.stream for _, event in waits} == {engine._stream}
    one = np.zeros(1, np.int32)
    for pages, stored, expected in (([8], True, 0), ([9], False, 1), ([9], False, 0)):
        waits.clear()
        engine.step(one, one, step_of((pages, 0, 1), page=PAGE, stored=stored), one)
        assert [event.stream for _, event in waits] == [engine._copies._stream] * expected
    engine.finish_copies()
