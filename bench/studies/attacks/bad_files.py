"""Kinds of bad input that are the files of a run, weights to import, and what is no ordinary file."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.studies.attacks.bad_settings import LONG, Kind
from bench.studies.attacks.calls import RUN, Call, evaluate, evaluate_alone, import_weights, resume, train
from bench.studies.attacks.small_project import MODEL, TRAIN, VAL

CHECKPOINT, ARTIFACT = Path(RUN, "checkpoint.pt"), Path(RUN, "model.pgolf")
OTHER_MODEL = "other/other_330_bpe.model"


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """A file of torch.save with what it holds changed."""
    import torch

    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def checkpoint(change: Callable[[dict], Any]) -> Kind:
    def kind(chance: random.Random) -> Call:
        changed(CHECKPOINT, change)
        return resume("checkpoint.pt: not a checkpoint of")

    return kind


def tampered_state(chance: random.Random) -> Call:
    from test_train_checkpoints import TAMPERED

    changed(CHECKPOINT, TAMPERED[chance.choice(sorted(TAMPERED))])
    return resume("checkpoint.pt: not a checkpoint of")


def tampered_fields(chance: random.Random) -> Call:
    from test_checkpoint import TAMPERED

    changed(CHECKPOINT, lambda state: state.update(TAMPERED[chance.choice(sorted(TAMPERED))]))
    return chance.choice((resume, lambda named: Call(("size", RUN), named)))("checkpoint.pt: not a checkpoint of")


def damaged(path: Path | str, chance: random.Random) -> None:
    """Empty, cut, or with its bytes changed where it begins."""
    whole = Path(path).read_bytes()
    cut = chance.choice((0, 1, chance.randrange(len(whole)), len(whole) - 1))
    junk = bytes(chance.randrange(256) for _ in range(64))
    Path(path).write_bytes(chance.choice((whole[:cut], junk + whole[64:])))


def damaged_checkpoint(chance: random.Random) -> Call:
    damaged(CHECKPOINT, chance)
    return resume("checkpoint.pt: not a checkpoint of")


def settings_file(*texts: str, named: str = "not the settings of a run") -> Kind:
    def kind(chance: random.Random) -> Call:
        Path(RUN, "settings.json").write_text(chance.choice(texts), encoding="utf-8", errors="surrogateescape")
        return chance.choice((resume, evaluate, lambda named: Call(("size", RUN), named)))(named)

    return kind


def settings_values(*changes: dict[str, Any], named: str = "settings.json") -> Kind:
    def kind(chance: random.Random) -> Call:
        path = Path(RUN, "settings.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **chance.choice(changes)}))
        return chance.choice((resume, evaluate))(named)

    return kind


def hostile_artifact(chance: random.Random) -> Call:
    from hostile_artifacts import hostile_files

    files = hostile_files()
    ARTIFACT.write_bytes(files[chance.choice(sorted(files))][0])
    return artifact_call(chance, "model.pgolf")


def artifact_call(chance: random.Random, named: str) -> Call:
    words = chance.choice((("eval", RUN), *(("artifact", each, RUN) for each in ("verify", "show", "compare"))))
    return Call(words, named)


def damaged_artifact(chance: random.Random) -> Call:
    damaged(ARTIFACT, chance)
    return artifact_call(chance, "model.pgolf")


def metadata(named: str, change: Callable[[dict, random.Random], Any]) -> Kind:
    """The artifact with other metadata, scored or verified."""

    def kind(chance: random.Random) -> Call:
        from pgolf.artifact import read_artifact, write_artifact

        artifact = read_artifact(ARTIFACT)
        change(artifact.metadata, chance)
        write_artifact(ARTIFACT, artifact.tensors.values(), artifact.metadata)
        return chance.choice((evaluate(named), Call(("artifact", "verify", RUN), named)))

    return kind


def of_model(named: str = "artifact", **values: Any) -> Kind:
    return metadata(named, lambda data, chance: data["model"].update(values))


def of_scoring(*changes: Any) -> Kind:
    def change(data: dict, chance: random.Random) -> None:
        chosen = chance.choice(changes)
        data["scoring"] = {**data["scoring"], **chosen} if isinstance(chosen, dict) else chosen

    return metadata("artifact", change)


def other_tokenizer(chance: random.Random) -> Call:
    return evaluate("not the tokenizer", "--tokenizer-path", OTHER_MODEL)


def without_settings(chance: random.Random) -> Call:
    Path(RUN, "settings.json").unlink()
    return evaluate("name --data-path and --tokenizer-path")


def special_tensor(kind: str) -> Kind:
    """Of weights to import."""

    def make(chance: random.Random) -> Call:
        import torch
        from test_import_checkpoint import SPECIAL

        state = torch.load("weights.pt", weights_only=True)
        name = chance.choice([name for name in state if state[name].ndim == 2 and state[name].shape[0] > 1])
        state[name] = SPECIAL[kind][0](state[name])
        torch.save(state, "weights.pt")
        return import_weights("weights.pt: ")

    return make


def weights(named: str, change: Callable[[dict, random.Random], Any]) -> Kind:
    def kind(chance: random.Random) -> Call:
        changed(Path("weights.pt"), lambda state: change(state, chance))
        return import_weights(named)

    return kind


def saved(named: str, make: Callable[[], Any]) -> Kind:
    """A file of torch.save with something else in it."""

    def kind(chance: random.Random) -> Call:
        import torch

        torch.save(make(), "weights.pt")
        return import_weights(named)

    return kind


def quantized() -> dict:
    import torch

    return {"tok_emb.weight": torch.quantize_per_tensor(torch.ones(320, 32), 0.1, 0, torch.qint8)}


def circle() -> dict:
    state: dict = {}
    state["tok_emb.weight"] = state
    return state


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def pickled(chance: random.Random) -> Call:
    import pickle

    Path("weights.pt").write_bytes(pickle.dumps({"tok_emb.weight": Hostile()}, protocol=chance.choice((0, 2, 4))))
    return import_weights("weights.pt")


def damaged_weights(chance: random.Random) -> Call:
    damaged("weights.pt", chance)
    return import_weights("weights.pt")


def first(state: dict, value: Any) -> None:
    state[next(iter(state))].view(-1)[0] = value


def random_name(state: dict, chance: random.Random) -> str:
    return chance.choice(sorted(state))


# What is no ordinary file, in the place of each file that a command reads, and the command.

PLACES = {
    MODEL: train(MODEL),
    TRAIN: train("_train_"),
    VAL: train("_val_"),
    str(ARTIFACT): evaluate(RUN),
    str(CHECKPOINT): resume("checkpoint.pt"),
    f"{RUN}/settings.json": resume("settings.json"),
    "weights.pt": import_weights("weights.pt"),
    "data.txt": Call(("data", "tokenize", "data.txt", "--out", "new"), "data.txt"),
    "new.model": evaluate("new.model", "--tokenizer-path", "new.model"),
    "new.pgolf": evaluate_alone("new.pgolf", "new.pgolf"),
    "other.model": Call(("data", "inspect", "data", "--tokenizer", "other.model"), "other.model"),
}


def no_file(make: Callable[[str], Any]) -> Kind:
    def kind(chance: random.Random) -> Call:
        place = chance.choice(sorted(PLACES))
        Path(place).unlink(missing_ok=True)
        make(place)
        return PLACES[place]

    return kind


def unreadable(chance: random.Random) -> Call:
    place = chance.choice(sorted(PLACES))
    Path(place).touch()
    for path in (Path(), *Path().rglob("*")):
        path.chmod(0o777)
    Path(place).chmod(0)
    return replace(PLACES[place], as_nobody=True)


def giant(place: str) -> None:
    """A file of 2 GB that takes no space."""
    with open(place, "wb") as file:
        file.truncate(1 << 31)


def giants(chance: random.Random) -> Call:
    call = no_file(giant)(chance)
    return replace(call, named="cannot fill") if call.named == "data.txt" else call  # read, it is hardly any text


KINDS: dict[str, Kind] = {
    "RESUME: state tampered": tampered_state,
    "RESUME: fields tampered": tampered_fields,
    "RESUME: file damaged": damaged_checkpoint,
    "RESUME: step": lambda chance: checkpoint(
        lambda s: s.update(step=chance.choice((-1, 2.0, "3", True, 10**18, None)))
    )(chance),
    "RESUME: used_seconds": lambda chance: checkpoint(
        lambda s: s.update(used_seconds=chance.choice((float("nan"), float("inf"), -1.0, 1, "1", 1e300)))
    )(chance),
    "RESUME: flops": lambda chance: checkpoint(lambda s: s.update(flops=chance.choice((-1, 1e9, 10**40, None))))(
        chance
    ),
    "RESUME: position": lambda chance: checkpoint(
        lambda s: s["loader"].update(position=chance.choice((10**9, -1, 10**30, "0", True, [1])))
    )(chance),
    "RESUME: epoch": lambda chance: checkpoint(
        lambda s: s["loader"].update(epoch=chance.choice((-1, 10**30, "0", 0.0)))
    )(chance),
    "RESUME: NaN in weights": checkpoint(lambda s: first(s["model"], float("nan"))),
    "RESUME: infinity in the average": checkpoint(
        lambda s: s["average"]["average"][0].view(-1)[:1].fill_(float("inf"))
    ),
    "RESUME: nested": checkpoint(lambda s: s.update(loader={"position": [[[[]]]] * 50})),
    "RESUME: weights to import": lambda chance: (
        CHECKPOINT.write_bytes(Path("weights.pt").read_bytes()) and resume("checkpoint.pt: not a checkpoint of")
    ),
    "settings.json of another kind": settings_file("[]", "null", "7", '"x"', "{}x", "", "\udcff", "\ufeff{}"),
    "settings.json nested": settings_file(
        "[" * 100_000, '{"a":' * 100_000, '{"seed": ' + "[" * 50_000 + "]" * 50_000 + "}"
    ),
    "settings.json huge": settings_file(
        " " * 16_000_001, '{"seed":' + "9" * 1_000_000 + "}", json.dumps({"seed": "x" * 10**6})
    ),
    "settings.json with an unknown setting": settings_values({"more": 1}, {LONG: 1}, {"\x1b[2J": 1}, {"\ud800": 1}),
    "settings.json with wrong values": settings_values(
        {"seed": None},
        {"seed": {}},
        {"model_dim": 1e300},
        {"model_dim": True},
        {"preset": ["demo"]},
        {"seed": float("nan")},
    ),
    "settings.json with wrong paths": settings_values(
        {"data_path": LONG},
        {"data_path": "\ud800"},
        {"data_path": "a\0b"},
        {"tokenizer_path": ["x"]},
        {"tokenizer_path": "\x1b"},
    ),
    "settings.json started nowhere": settings_values(
        *({"started_in": each} for each in ("x", [], [1], {}, 0, [LONG], ["a\0b"], ["\ud800"])), named=""
    ),
    "artifact hostile": hostile_artifact,
    "artifact damaged": damaged_artifact,
    "artifact without settings": without_settings,
    "artifact of another tokenizer": other_tokenizer,
    "artifact of 1,700 layers": of_model(num_layers=1700),
    "artifact of width 2^16": of_model(model_dim=2**16),
    "artifact of 2^31 bigrams": of_model(bigram_vocab_size=2**31),
    "artifact of value width 2^30": of_model(ve_dim=2**30, ve_layers="0"),
    "artifact of 2^34 weights": of_model(model_dim=16384, num_layers=1000),
    "artifact with a softcap of 1e308": of_model(logit_softcap=1e308),
    "artifact of no head": of_model(num_heads=0),
    "artifact with a word for a number": of_model(num_layers="many"),
    "artifact with an odd slope": of_model(mlp_slope=-1e30),
    "artifact with a field less": metadata("artifact", lambda data, chance: data["model"].popitem()),
    "artifact with no model": metadata(
        "model", lambda data, chance: data.update(model=chance.choice(([], None, 7, "x", {})))
    ),
    "artifact with a context of 2^31": of_scoring({"seq_len": 2**31}, {"seq_len": 10**18}),
    "artifact with a context of none": of_scoring({"seq_len": 0}, {"seq_len": -1}, {"seq_len": "8"}, {"seq_len": None}),
    "artifact with a stride of none": of_scoring({"stride": -1}, {"stride": 33}, {"stride": 0.5}),
    "artifact with a first piece of none": of_scoring(
        {"bos_id": -1}, {"bos_id": 2**31}, {"bos_id": "x"}, {"bos_id": [1]}
    ),
    "artifact with no scoring": of_scoring([], None, 7, {"more": 1}),
    "artifact with no tokenizer": metadata(
        "tokenizer", lambda data, chance: data.update(tokenizer_sha256=chance.choice((None, 7, "x")))
    ),
    **{
        f"import: {kind}": special_tensor(kind)
        for kind in (
            "sparse",
            "compressed rows",
            "nested",
            "meta",
            "float8",
            "float4",
            "integers",
            "complex",
            "too large for float32",
            "expanded",
        )
    },
    "import: quantised": saved("weights.pt", quantized),
    "import: a circle": saved("weights.pt", circle),
    "import: no state": saved("weights.pt", lambda: [1, {"a": None}]),
    "import: nothing": saved("missing", dict),
    "import: pickled code": pickled,
    "import: code in torch's file": saved("weights.pt", lambda: {"tok_emb.weight": Hostile()}),
    "import: file damaged": damaged_weights,
    "import: a tensor missing": weights("missing", lambda state, chance: state.pop(random_name(state, chance))),
    "import: a tensor too many": weights(
        "no place",
        lambda state, chance: state.update(
            {chance.choice(("lm_head.weight", LONG, "\x1b[2J", "")): state["tok_emb.weight"]}
        ),
    ),
    "import: NaN": weights(
        "not finite", lambda state, chance: state[random_name(state, chance)].view(-1)[:1].fill_(float("nan"))
    ),
    "import: another shape": weights(
        "shape", lambda state, chance: state.update({"tok_emb.weight": state["tok_emb.weight"].T})
    ),
    "a pipe": no_file(os.mkfifo),
    "/dev/zero": no_file(lambda place: os.symlink("/dev/zero", place)),
    "a folder": no_file(os.mkdir),
    "a link to nothing": no_file(lambda place: os.symlink("nothing", place)),
    "a link to itself": no_file(lambda place: os.symlink(os.path.basename(place), place)),
    "a file of 2 GB": giants,
    "a file that may not be read": unreadable,
}
