"""Checkpoints of the entries' scripts: every tensor lands in its place, or one line names the one that does not."""

import json
import pickle

import pytest
import torch

from pgolf.artifact import read_artifact
from pgolf.cli import main
from pgolf.errors import DataError
from pgolf.import_checkpoint import convert, read_state, weight_map
from pgolf.model import Model, ModelConfig
from pgolf.quantize import model_from_artifact
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
    back = model_from_artifact(read_artifact(target), torch.float32, torch.device("cpu"))
    assert back.config == model.config
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


def test_files_that_are_no_weights_are_one_line(tmp_path, capsys):
    path = tmp_path / "final_model.pt"
    path.write_bytes(b"not weights")
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_state(path)
    torch.save({"model": {"nested": torch.ones(1)}}, path)
    with pytest.raises(DataError, match="not a state dict"):
        read_state(path)
    torch.save({"tok_emb.weight": Hostile()}, path)
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_state(path)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_state(path)
    assert "ran" not in capsys.readouterr().out
    assert main(["import-checkpoint", str(tmp_path / "nowhere.pt")]) == 2
    assert "nowhere.pt: no such file" in capsys.readouterr().err
