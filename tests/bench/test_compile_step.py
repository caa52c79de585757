"""The generated kernels of a small step compile to sm_90 machine code, and what does not is told."""

import json
import re
import types
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

pytest.importorskip("triton")
pytest.importorskip("pydantic")
from bench.step_model import compile_step
from bench.step_model.compile_step import Compiled, Configuration, Step, compile_all, compile_text
from bench.step_model.generated import Source, optimiser_sources, step_sources
from pgolf.model import ModelConfig
from pgolf.model.execution import FUSABLE
from pgolf.settings import Settings

TOKENS, LENGTH = 4096, 1024
SETTINGS = Settings(
    vocab_size=256,
    num_layers=1,
    model_dim=128,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=16,
    mlp_slope=0.5,
    unet_skips=False,
    loader="documents",
    train_batch_tokens=8 * TOKENS,
    train_seq_len=LENGTH,
    micro_batch_tokens=TOKENS,
)
CONFIG = ModelConfig.of(SETTINGS)


@pytest.fixture(scope="module")
def sources():
    return step_sources(CONFIG, False, TOKENS, LENGTH, True, FUSABLE)


@pytest.fixture(autouse=True)
def _caches(monkeypatch, tmp_path):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_every_kernel_of_a_small_step_compiles(sources):
    assert len({source.anonymous for source in sources}) >= 15
    assert {source.part for source in sources} == {"forward", "backward"}
    assert all(source.launches >= 1 and source.name in source.text for source in sources)
    known = {function for source in sources for function in source.functions}
    assert {"rotary.py:rotary_tables", "model.py:cast", "softcapped_cross_entropy.py:check_range"} <= known
    for text in {source.anonymous for source in sources}:
        found = compile_text(text, all_configurations=False)
        assert found.failure == ""
        (first,) = found.configurations
        assert 0 < first.registers <= 255
        assert first.shared_bytes <= 232_448  # of one SM
        # The slow path of sin and cos keeps an array there.
        assert first.local_bytes <= (32 if "cos" in text else 0)


def test_the_optimisers_kernels_compile():
    one_bank = types.SimpleNamespace(shapes=lambda: {"mlp_up_bank": (1, 512, 128), "norm": (2, 128)})
    sources = optimiser_sources(one_bank, SETTINGS.model_copy(update={"muon_row_normalize": True}))
    functions = {function for source in sources for function in source.functions}
    assert functions == {"muon.py:_add_momentum", "muon.py:_move"}
    moves = [source for source in sources if source.functions == {"muon.py:_move"}]
    assert ": 'fp64'" in moves[0].text, "the learning rate is the host's number"
    assert compile_text(moves[0].anonymous).failure == ""


def test_what_does_not_compile_is_one_line():
    assert compile_text("raise ValueError('first\\nlast\\n')").failure == "ValueError: last"
    assert compile_text("").failure.startswith("AttributeError: ")


class Pool:
    """Of processes that die of the text "dies", and with them their pool."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, text, every):
        future = Future()
        if text == "dies":
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(Compiled((), "", 1.0))
        return future


def source(text, launches=1, part="forward"):
    return Source("triton_poi_0", text, part, launches, frozenset({"model.py:cast"}))


def test_a_compiler_that_dies_takes_nobody_with_it(monkeypatch):
    monkeypatch.setattr(compile_step, "_workers", lambda folder, processes: Pool())
    found = compile_all([source("good"), source("dies"), source("also good"), source("good")])
    assert {text: kernel.failure for text, kernel in found.items()} == {
        "good": "",
        "dies": "the compiler's process died",
        "also good": "",
    }


def test_one_source_under_two_names():
    one = Source("triton_a_1", "def triton_a_1(): 'triton_a_1'", "forward", 1, frozenset())
    assert one.anonymous == Source("triton_b_22", one.text.replace("a_1", "b_22"), "backward", 2, frozenset()).anonymous


@pytest.fixture
def _compiled(monkeypatch):
    steps = [
        Step("pre-loop, FUSED_GLUE=on", [source("a", 3), source("b", part="backward")]),
        Step("optimiser", [source("a", 2), source("c", part="optimiser")]),
    ]
    spilling = Configuration("XBLOCK 8, 2 warps", 255, 240, 744, 0)
    compiled = {
        "a": Compiled((Configuration("XBLOCK 1, 2 warps", 34, 0, 0, 0), spilling), "", 2.4),
        "b": Compiled((), "PTXASError: no", 1.0),
        "c": Compiled((Configuration("XBLOCK 4, 4 warps", 20, 0, 0, 16),), "", 0.4),
    }
    monkeypatch.setattr(compile_step, "steps_of", lambda *_: steps)
    monkeypatch.setattr(compile_step, "compile_all", lambda sources, every: compiled)


@pytest.mark.usefixtures("_compiled")
def test_the_command(capsys, tmp_path):
    assert compile_step.main(["--json", str(tmp_path / "x.json"), "MUON_BETA2=0.5"]) == 1  # "b" did not compile
    report = capsys.readouterr().out
    rows = [
        re.split(r"  +", line) for line in report.splitlines() if "FUSED_GLUE=on  " in line or "optimiser  " in line
    ]
    assert rows == [
        ["pre-loop, FUSED_GLUE=on", "2", "4", "1", "1", "0 | 1", "255", "3"],
        ["optimiser", "2", "3", "2", "0", "0 | 1", "255", "3"],
    ]
    assert "did not compile: 1" in report
    assert "PTXASError: no" in report
    assert "XBLOCK 8, 2 warps: 255 registers, 240 bytes and 744 instructions of local memory" in report
    answer = json.loads((tmp_path / "x.json").read_text())
    assert answer["steps"] == {"pre-loop, FUSED_GLUE=on": {"0": 3, "1": 1}, "optimiser": {"0": 2, "2": 1}}
    assert [kernel["failure"] for kernel in answer["kernels"]] == ["", "PTXASError: no", ""]
    assert compile_step.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["preset"] == "record"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NUM_LAYERS"], "NUM_LAYERS: expected SETTING=value"),
        (["NUM_LAYERS=x"], "NUM_LAYERS"),
        (["--preset", "demo", "--loop"], "no loops"),
        (["--preset", "recrod"], "recrod"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compile_step.main(arguments)
    assert message in capsys.readouterr().err.replace("\n", " ")
