"""Checkpoints of the entries' scripts: every tensor lands in its place, or one line names the one that does not."""

import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from small_trainer import make_trainer

from pgolf.artifact import read_artifact
from pgolf.artifact.import_checkpoint import convert, read_state, weight_map
from pgolf.artifact.model import model_from_artifact
from pgolf.cli import main
from pgolf.errors import DataError
from pgolf.model import Execution, Model, ModelConfig
from pgolf.runtime.torch_file import load_plain
from pgolf.settings import load_settings

NARROW = {
    "VOCAB_SIZE": "320",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "VE_DIM": "8",
    "BIGRAM_VOCAB_SIZE": "20",
    "BIGRAM_DIM": "8",
}


def config_of(preset: str, **environ: str) -> ModelConfig:
    return ModelConfig.of(load_settings({"PRESET": preset, **NARROW, **environ}))


def saved_by_layers(model: Model) -> dict[str, torch.Tensor]:
    """A state dict as the scripts with one module a layer save it, written out by hand."""
    n = model.config.num_layers
    state = {
        "tok_emb.weight": model.embedding,
        "skip_weights": model.skip_weights,
        "skip_gates": model.skip_gates,
        "bigram.embed.weight": model.bigram_embedding,
        "bigram.proj.weight": model.bigram_projection,
        "bigram.scale": model.bigram_scale[0],
        "ve_shared.embed.weight": model.value_embedding,
        "ve_shared.proj.weight": model.value_projection,
        "ve_shared.scale": model.value_scale[0],
        "ve_layer_scales.0": model.value_layer_scales[:1],
        "ve_layer_scales.1": model.value_layer_scales[1:],
    }
    for i in range(n):
        state |= {
            f"blocks.{i}.attn.c_q.weight": model.qo_bank[i],
            f"blocks.{i}.attn.c_k.weight": model.kv_bank[i],
            f"blocks.{i}.attn.c_v.weight": model.kv_bank[n + i],
            f"blocks.{i}.attn.proj.weight": model.qo_bank[n + i],
            f"blocks.{i}.mlp.fc.weight": model.up_bank[i],
            f"blocks.{i}.mlp.proj.weight": model.down_bank[i],
            f"blocks.{i}.attn.q_gain": model.q_gain[i],
            f"blocks.{i}.attn_scale": model.attn_scale[i],
            f"blocks.{i}.mlp_scale": model.mlp_scale[i],
            f"blocks.{i}.resid_mix": model.resid_mix[i],
        }
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def saved_with_banks(model: Model) -> dict[str, torch.Tensor]:
    """As #2135's script saves it."""
    state = {name: p for name, p in model.named_parameters() if name.startswith(("qo_", "kv_", "skip_", "parallel_"))}
    state |= {"tok_emb.weight": model.embedding, "mlp_up_bank": model.up_bank, "mlp_down_bank": model.down_bank}
    state |= {"smear_gate.weight": model.smear_gate, "smear_lambda": model.smear_lambda}
    state |= {"softcap_pos": model.softcaps[0], "softcap_neg": model.softcaps[1]}
    state |= {"bigram.embed.weight": model.bigram_embedding, "bigram.proj.weight": model.bigram_projection}
    state |= {"bigram.scale": model.bigram_scale[0]}
    for i in range(model.config.num_layers):
        state |= {f"blocks.{i}.attn.attn_gate_w": model.attn_gate[i], f"blocks.{i}.attn.q_gain": model.q_gain[i]}
        state |= {f"blocks.{i}.{name}": getattr(model, name)[i] for name in ("attn_scale", "mlp_scale", "resid_mix")}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def random_model(config: ModelConfig) -> Model:
    model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize(("preset", "save"), [("dense4096", saved_by_layers), ("record", saved_with_banks)])
def test_every_tensor_finds_its_place(preset, save):
    model = random_model(config_of(preset))
    found = convert(save(model), model.config)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert set(save(model)) <= set(weight_map(model.config))


def test_the_command_makes_an_artifact_of_the_same_model(tiny_data, tmp_path, monkeypatch, capsys):
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    model = random_model(config_of("record"))
    state = {f"module.{name}": tensor.bfloat16() for name, tensor in saved_with_banks(model).items()}
    torch.save(state, tmp_path / "final_model.pt")
    target = tmp_path / "model.pgolf"
    arguments = ["--preset", "record", "--output", str(target), "--tokenizer-path", str(tiny_data[1])]
    assert main(["import-checkpoint", str(tmp_path / "final_model.pt"), *arguments]) == 0
    assert "parameters in float32" in capsys.readouterr().out
    execution = Execution(fused=frozenset({"xsa_gate"}))
    back = model_from_artifact(read_artifact(target), execution, torch.device("cpu"))
    assert (back.config, back.execution) == (model.config, execution)
    assert back.looping
    assert back.caps_differ  # the random caps
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16().float()), name
    assert (
        main(["eval", str(target), "--data-path", str(tiny_data[0]), *arguments[-2:], "--seq-len", "64", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["val_bpb"] > 0


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks.3.attn.c_q.weight": None}, ["blocks.3.attn.c_q.weight", "missing", "qo_bank"]),
        ({"skip_gates": None}, ["skip_gates", "missing"]),
        ({"blocks.11.attn.q_gain": torch.ones(4)}, ["blocks.11.attn.q_gain", "no place"]),
        ({"lm_head.weight": torch.ones(320, 32)}, ["lm_head.weight", "no place"]),
        ({"tok_emb.weight": torch.ones(321, 32)}, ["tok_emb.weight", "(321, 32)", "embedding", "(320, 32)"]),
        ({"blocks.0.mlp.fc.weight": torch.ones(32, 128)}, ["blocks.0.mlp.fc.weight", "(32, 128)", "(128, 32)"]),
        ({"blocks.2.resid_mix": torch.full((2, 32), torch.inf)}, ["blocks.2.resid_mix", "not finite"]),
        ({"bigram.scale": torch.tensor(1)}, ["bigram.scale", "floating point"]),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    model = random_model(config_of("dense4096"))
    state = {**saved_by_layers(model), **change}
    with pytest.raises(DataError) as error:
        convert({name: tensor for name, tensor in state.items() if tensor is not None}, model.config)
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


SPECIAL = {
    "sparse": (lambda x: x.to_sparse(), "dense"),
    "compressed rows": (lambda x: x.to_sparse_csr(), "dense"),
    "nested": (lambda x: torch._nested_tensor_from_tensor_list([*x]), "dense"),
    "meta": (lambda x: x.to("meta"), "no numbers"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn, but weights are floating point: float32"),
    "float4": (lambda x: x.to(torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2, but weights are"),
    "integers": (lambda x: x.long(), "int64, but weights are"),
    "complex": (lambda x: x.to(torch.complex64), "complex64, but weights are"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8, but weights are"),
    "too large for float32": (lambda x: torch.full_like(x, 1e300, dtype=torch.float64), "not finite in float32"),
    "expanded": (lambda x: torch.ones(1).expand(10**6, 10**6), "(1000000, 1000000), but skip_weights needs"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch about its own kinds
def test_special_tensors_are_one_line(kind, tmp_path, tiny_data, monkeypatch, capsys):
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    make, named = SPECIAL[kind]
    path = tmp_path / "final_model.pt"
    try:
        torch.save({"skip_weights": make(torch.zeros(config_of("dense4096").num_skips, 32))}, path)
    except Exception:  # whatever an older torch raises for a kind that it does not save
        pytest.skip(f"this torch saves no {kind} tensors")
    refused = ["import-checkpoint", str(path), "--preset", "dense4096", "--tokenizer-path", str(tiny_data[1])]
    assert main([*refused, "--output", str(tmp_path / "model.pgolf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert (f"{path}: skip_weights: " in error and named in error) or "cannot be read as weights" in error
    assert not (tmp_path / "model.pgolf").exists()


def test_torch_says_nothing_of_its_own(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), tmp_path / "x.pt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_plain(tmp_path / "x.pt")
    assert told == []


def repacked(path, compression: int, times: int = 1) -> None:
    """Write the zip file again, with its entries so compressed, and the largest listed so many times."""
    with zipfile.ZipFile(path) as old:
        content = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(name, data)
        largest = max(new.infolist(), key=lambda entry: entry.file_size)
        new.filelist += [largest] * (times - 1)


def test_containers_that_expand_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("read before it was checked"))
    path = tmp_path / "final_model.pt"
    torch.save({"tok_emb.weight": torch.zeros(10**6)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="it is compressed"):
        read_state(path)
    torch.save({"tok_emb.weight": torch.zeros(10**4)}, path)
    repacked(path, zipfile.ZIP_STORED, times=50)
    with pytest.raises(DataError, match="it declares more bytes than it has"):
        read_state(path)


def test_our_own_checkpoint_is_told_from_weights(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    with pytest.raises(DataError, match=r"checkpoint of this package's own run.*`pgolf eval RUN`"):
        read_state(tmp_path / "checkpoint.pt")


def test_files_that_are_no_weights_are_one_line(tmp_path, capsys):
    path = tmp_path / "final_model.pt"
    torch.save({"tok_emb.weight": torch.ones(30)}, path)
    whole = path.read_bytes()
    for content in (b"", b"junk", b"\x80", b"PK\x03\x04", pickle.dumps(Hostile()), whole[:500], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as weights") as caught:
            read_state(path)
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
    for ours, damage in ((b"tok_emb", b"\xff" * 7), (b"data.pkl", b"data.xxx")):
        path.write_bytes(whole.replace(ours, damage))
        with pytest.raises(DataError, match="cannot be read as weights"):
            read_state(path)
    torch.save({"model": {"nested": torch.ones(1)}}, path)
    with pytest.raises(DataError, match="not a state dict"):
        read_state(path)
    torch.save({"tok_emb.weight": Hostile()}, path)
    with pytest.raises(DataError, match=r"more than tensors and plain values.*; nothing of it was run") as caught:
        read_state(path)
    assert "weights_only" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("nowhere.pt", "no such file"), ("pipe", "no such file")):
        assert main(["import-checkpoint", str(tmp_path / name)]) == 2
        assert f"{name}: {told}" in capsys.readouterr().err
