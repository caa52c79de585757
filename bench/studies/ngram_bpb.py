"""What each mixture of the n-gram cache makes of a trained model's score on real text.

    python -m bench.studies.ngram_bpb runs/A ...     # folders of finished runs; their artifacts are scored anew

Each row is one evaluation as `NGRAM=... train_gpt.py` does it; the model alone is the first.
"""

import argparse
import time
from pathlib import Path

from pgolf.artifact import read_artifact
from pgolf.artifact.model import model_from_artifact
from pgolf.data.dataset import open_dataset
from pgolf.evaluation.ngram import NgramConfig, evaluate_ngram
from pgolf.evaluation.ngram_cache import MIXINGS
from pgolf.model import choose_execution
from pgolf.run.saved_settings import read_settings
from pgolf.runtime.machine import compute_dtype
from pgolf.runtime.ranks import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    print("| run | tokens | mixture | bpb | less than the model | seconds, model included |")
    print("|---|---|---|---|---|---|")
    with launch("auto") as ranks:
        for folder in parser.parse_args().runs:
            settings = read_settings(folder / "settings.json")
            data = open_dataset(settings, ranks)
            artifact = read_artifact(folder / "model.pgolf")
            dtype = compute_dtype(settings.dtype, ranks.device)
            execution = choose_execution(ranks.device, dtype, settings.longest_text)
            model = model_from_artifact(artifact, execution, ranks.device)
            how = {**settings.scoring, "batch_tokens": settings.val_batch_size, "ranks": ranks}
            for mixing in MIXINGS:
                begin = time.perf_counter()
                split = data.val_tokens, data.val_token_bytes
                base, mixed = evaluate_ngram(model, *split, NgramConfig.of(settings, mixing), **how)
                seconds = time.perf_counter() - begin
                if mixing == MIXINGS[0]:
                    print(f"| {folder.name} | {base.tokens} | none | {base.bpb:.4f} | | |", flush=True)
                line = f"{mixing} | {mixed.bpb:.4f} | {base.bpb - mixed.bpb:.4f} | {seconds:.1f} |"
                print(f"| {folder.name} | {base.tokens} | {line}", flush=True)


if __name__ == "__main__":
    main()
