"""Quantisers at equal bytes: what each costs a trained model in bits per byte.

    python -m bench.studies.quantizers runs/A runs/B ...  # folders of finished runs; their checkpoints quantised anew

For each run: GPTQ at the settings' steps makes a file of B bytes. Every other quantiser's steps, all scaled alike, are
made to fit B within `NEAR`; "+ budget" chooses each tensor's step instead (quantization/byte_budget.py). Calibration
sees the batches that the run's own calibration saw, the scores are in float32 over the whole validation split. One
rounding is one draw of noise that moves the score as much as the quantisers differ, so each figure is the mean over
`DRAWS` step scales around the one that fits; bytes are those of the middle one.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from pgolf.artifact import write_artifact
from pgolf.artifact.model import load_weights
from pgolf.data.dataset import open_dataset, training_loader
from pgolf.evaluation.scoring import evaluate
from pgolf.model import Model, ModelConfig
from pgolf.quantization.byte_budget import PROBE_ROWS, measure_rises
from pgolf.quantization.calibration import collect_hessians
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.quantize import quantize, quantize_to_size
from pgolf.quantization.quantizers import QUANTIZERS
from pgolf.run.saved_settings import read_settings
from pgolf.runtime.ranks import launch
from pgolf.training import checkpoint

NEAR = 0.001
VARIANTS = {name: {"quantizer": name} for name in QUANTIZERS} | {
    "gptq, LQER": {"quantizer": "gptq", "lqer_rank": 4},
    "gptq, #1855's clips": {"quantizer": "gptq", "mlp_clip_sigmas": 11.5, "attn_clip_sigmas": 13.0},
    "gptq, mlp int5": {"quantizer": "gptq", "mlp_bits": 5},
}
BUDGETED = ("gptq", "trellis")
DRAWS = (0.96, 0.98, 1.0, 1.02, 1.04)


def rows_of(folder: Path, ranks, work: Path):
    """Every quantiser's figures on one run."""
    settings = read_settings(folder / "settings.json")
    state = checkpoint.load(folder / checkpoint.CHECKPOINT)
    data = open_dataset(settings, ranks)
    config = ModelConfig.of(settings)
    model = Model(config)
    model.load_state_dict(dict(checkpoint.weights(folder)))
    model.to(ranks.device)

    def batches():
        loader = training_loader(settings, data.train_shards, ranks)
        loader.load_state_dict(state["loader"])
        for _ in range(settings.gptq_calibration_batches):
            yield from loader.next_batch().micro_batches(settings.micro_batch_tokens, settings.train_seq_len)

    def bpb(scored: Model) -> float:
        return evaluate(
            scored, data.val_tokens, data.val_token_bytes, settings.train_seq_len, settings.val_batch_size, ranks
        ).bpb

    def mean_bpb(chosen, clips: dict[str, float]) -> float:
        scored, found = Model(config).to(ranks.device), []
        for draw in DRAWS:
            stored = quantize(model, hessians, chosen, {key: draw * clip for key, clip in clips.items()})
            load_weights(scored, stored)
            found.append(bpb(scored))
        return sum(found) / len(found)

    hessians = collect_hessians(model, batches(), ranks, lambda: float("inf"))
    path = work / "model.pgolf"

    def write(tensors):
        return write_artifact(path, tensors, {"model": config.as_dict()})

    base = bpb(model)
    wanted = None
    for name in sorted(VARIANTS, key=lambda name: name != "gptq"):  # gptq says how many bytes
        chosen = QuantizationConfig.of(settings.model_copy(update=VARIANTS[name]))
        clips = {key: chosen.clip_of(key) for key in hessians}
        begin = time.perf_counter()
        tensors = quantize(model, hessians, chosen, clips)
        seconds = time.perf_counter() - begin
        size, scale = write(tensors).total, 1.0
        wanted = wanted or size
        while abs(size / wanted - 1) > NEAR:
            coded = sum(p.numel() for key, p in model.named_parameters() if key in hessians)
            scale *= 2 ** (8 * (size - wanted) / coded)
            clips = {key: scale * chosen.clip_of(key) for key in hessians}
            size = write(quantize(model, hessians, chosen, clips)).total
        yield name, size, scale, seconds, base, mean_bpb(chosen, clips)
        if name not in BUDGETED:
            continue
        rises = measure_rises(model, hessians, itertools.islice(batches(), PROBE_ROWS), chosen, ranks)
        begin = time.perf_counter()
        found, _ = quantize_to_size(model, hessians, chosen, rises, write, wanted)
        seconds = time.perf_counter() - begin
        yield f"{name} + budget", found.total, found.codings, seconds, base, mean_bpb(chosen, found.clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    folders = parser.parse_args().runs
    print("| run | quantiser | bytes | steps' scale, or codings | seconds | bpb float | bpb quantised - float |")
    print("|---|---|---|---|---|---|---|")
    rises: dict[str, list[float]] = {}
    with launch("auto") as ranks, tempfile.TemporaryDirectory() as work:
        for folder in folders:
            for name, size, how, seconds, base, quantized in rows_of(folder, ranks, Path(work)):
                rises.setdefault(name, []).append(quantized - base)
                print(
                    f"| {folder.name} | {name} | {size} | {how:.4g} | {seconds:.2f} | {base:.5f} "
                    f"| {quantized - base:+.5f} |",
                    flush=True,
                )
    for name, each in rises.items():
        share = sum(each) / sum(rises["gptq"])
        print(f"{name}: mean {sum(each) / len(each):+.5f}, {share:.3f} of gptq's, over {len(each)} runs")


if __name__ == "__main__":
    main()
