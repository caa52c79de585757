"""One run, told top to bottom: settings, data, training, quantisation, artifact, and the artifact's score.

    torchrun --standalone --nproc_per_node=1 train_gpt.py                  # demo: real text, no GPU, no download
    PRESET=baseline torchrun --standalone --nproc_per_node=8 train_gpt.py  # the challenge's baseline on FineWeb

Every setting of pgolf/settings.py is an environment variable of its upper-case name, or an argument NAME=value.
"""

import os
import signal
import sys
from functools import partial
from itertools import islice

if __name__ == "__main__":  # until a run has something to lose and waits for it itself, Ctrl-C ends without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pgolf.run.entry import begin_training, ending
from pgolf.runtime.checkout import require_installation

if __name__ == "__main__":  # before torch, whose import takes seconds: help, and settings that cannot be used
    require_installation("train_gpt.py")
    begin_training(sys.argv[1:])

import torch

from pgolf.artifact import read_artifact, write_artifact
from pgolf.artifact.model import model_from_artifact
from pgolf.artifact.packed_code import code_bytes, raw_code_bytes
from pgolf.data.dataset import compressors_bpb, open_dataset, training_loader
from pgolf.evaluation.ngram import NgramConfig, evaluate_ngram
from pgolf.evaluation.scoring import Score, evaluate
from pgolf.model import Model, ModelConfig, choose_execution
from pgolf.ops.backends import check_environment
from pgolf.quantization.byte_budget import PROBE_ROWS, measure_rises
from pgolf.quantization.calibration import collect_hessians
from pgolf.quantization.config import QuantizationConfig
from pgolf.quantization.quantize import quantize_within_budget
from pgolf.quantization.quantizers import OPERATIONS
from pgolf.quantization.size import SizeProjection
from pgolf.run.record import Run, settings_of_run
from pgolf.runtime.machine import compute_dtype, keep_freed_memory
from pgolf.runtime.ranks import Ranks, launch
from pgolf.settings import Settings
from pgolf.training.trainer import Trainer


def run_training(settings: Settings, ranks: Ranks, run: Run) -> None:
    # Data
    with run.timed("data"):
        data = open_dataset(settings, ranks)
        loader = training_loader(settings, data.train_shards, ranks)
    run.log(f"train_loader:{settings.loader} dataset:{settings.data_path} train_shards:{len(data.train_shards)}")
    run.log(f"val_loader:tokens:{len(data.val_tokens) - 1} bytes:{int(data.val_token_bytes[1:].sum())}")

    # Model
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    dtype = compute_dtype(settings.dtype, ranks.device)
    config = ModelConfig.of(settings)
    execution = choose_execution(
        ranks.device, dtype, settings.longest_text, attention=settings.attention, fused_glue=settings.fused_glue
    )
    model = Model(config, execution).initialise(torch.Generator().manual_seed(settings.seed)).to(ranks.device)
    trainer = Trainer(model, loader, settings, ranks, run, data.tokenizer.byte_table())
    precision = str(dtype).removeprefix("torch.")
    run.note(parameters=config.parameters(), attention=execution.attention, dtype=precision)
    run.note(compile=trainer.compiled, cuda_graphs=trainer.cuda_graphs)
    run.log(f"model_params:{config.parameters()} world_size:{ranks.world_size} device:{run.summary['device_name']}")
    run.log(f"attention:{execution.attention} dtype:{precision} compile:{trainer.compiled} seed:{settings.seed}")
    run.log(f"fused_glue:{','.join(sorted(execution.fused)) or 'none'} cuda_graphs:{trainer.cuda_graphs}")

    scoring = {**settings.scoring, "batch_tokens": settings.val_batch_size, "ranks": ranks}

    def score(scored: Model, **changes: int) -> Score:
        return evaluate(scored, data.val_tokens, data.val_token_bytes, **{**scoring, **changes})

    # Train, then calibrate with what is left of the wall-clock budget
    quantization, code = QuantizationConfig.of(settings), code_bytes()
    run.warn_of_budget(code)
    projection = SizeProjection(model.named_parameters, settings, code)

    def project() -> None:
        run.log(projection.make())
        run.note(projected_artifact_bytes=projection.artifact_bytes)

    if ranks.first:
        trainer.at_warmdown = partial(run.attempt, "the size projection", project)
    with run.timed("warmup"):
        trainer.warm_up()
    if settings.resume:
        trainer.load()
    before = trainer.used_seconds
    trainer.train(validate=lambda: score(model, stride=0))  # on the way without overlap, to save time
    run.seconds["train"] = trainer.used_seconds - before
    with run.timed("calibration"):
        seconds_left, rises = trainer.countdown(), {}
        fitting = ranks.any(projection.near_budget)
        probing = settings.gptq_reserve_seconds / 2 if fitting else 0.0
        hessians = collect_hessians(model, trainer.calibration_batches(), ranks, lambda: seconds_left() - probing)
        if fitting:
            rises = measure_rises(
                model, hessians, islice(trainer.calibration_batches(), PROBE_ROWS), quantization, ranks
            )
    (calibration_seconds,) = ranks.agree(run.seconds["calibration"])
    used = trainer.used_seconds + calibration_seconds
    run.note(
        wallclock_used_seconds=used,
        within_wallclock=used <= settings.max_wallclock_seconds,
    )
    run.log(f"wallclock:{used:.2f}s of {settings.max_wallclock_seconds:g}s, calibration included")

    # Quantise and write the artifact
    artifact_path = run.folder / "model.pgolf"
    if ranks.first:
        metadata = {
            "model": config.as_dict(),
            "looping": model.looping,
            "scoring": settings.scoring,
            "tokenizer_sha256": data.tokenizer.sha256,
        }
        write = partial(write_artifact, artifact_path, metadata=metadata, mode=settings.artifact_coder)
        with run.timed("quantize"):
            budget = {"budget_bytes": settings.budget_bytes, "code_bytes": code, "wanted": settings.artifact_bytes}
            fitted = quantize_within_budget(model, hessians, quantization, rises, write, **budget, alive=ranks.alive)
        run.log(fitted or projection.error(artifact_path.stat().st_size))
        ranks.alive(done=True)
    else:
        ranks.wait_for_first()
    ranks.agree_file(artifact_path)

    # Score the weights as trained, then the file alone
    with run.timed("evaluate_float"):
        float_score = score(model)
    run.log_score(trainer.step, settings.iterations, float_score, trainer.used_seconds)
    with run.timed("evaluate"):
        artifact = read_artifact(artifact_path)
        stranger = model_from_artifact(artifact, execution, ranks.device)
        if settings.ngram == "off":
            final, mixed = score(stranger), None
        else:
            ngram = NgramConfig.of(settings)
            final, mixed = evaluate_ngram(stranger, data.val_tokens, data.val_token_bytes, ngram, **scoring)
    run.log(f"final_artifact_roundtrip_exact val_loss:{final.loss:.8f} val_bpb:{final.bpb:.8f}")
    if mixed:
        run.log(f"ngram:{settings.ngram} val_loss:{mixed.loss:.8f} val_bpb:{mixed.bpb:.8f}")

    # Where every byte of the budget went, and what other compressors make of the same text
    total = artifact.bytes.total + code
    by_role = {**artifact.bytes.roles, "container": artifact.bytes.container, "code": code}
    run.note(
        val_loss_float=float_score.loss,
        val_bpb_float=float_score.bpb,
        val_loss_quantized=final.loss,
        val_bpb_quantized=final.bpb,
        val_bpb_ngram=mixed and mixed.bpb,
        val_tokens=final.tokens,
        val_bytes=final.bytes,
        artifact_bytes=artifact.bytes.total,
        code_bytes=code,
        code_bytes_raw=raw_code_bytes(),
        total_bytes=total,
        fits_budget=total <= settings.budget_bytes,
        within_eval=not ranks.any(run.seconds["evaluate"] > settings.max_eval_seconds),
        bytes_by_role={**by_role, "left": settings.budget_bytes - total},
    )
    for name, size in by_role.items():
        run.log(f"bytes {name}:{size}")
    run.log(f"Total submission size: {total} bytes of {settings.budget_bytes}, left: {settings.budget_bytes - total}")
    if ranks.first:
        with run.timed("compressors"):
            others = run.attempt("the other compressors' figures", compressors_bpb, data, ranks.alive) or {}
        ranks.alive(done=True)
        run.note(compressors_bpb=others)
        run.log("same text: " + " ".join(f"{name}:{bpb:.4f}bpb" for name, bpb in others.items()))
    else:
        ranks.wait_for_first()
    run.close()
    run.log(f"report:{run.folder / 'report.html'} total_time:{run.seconds['total']:.1f}s")


def main() -> int:
    def run_all() -> None:
        settings = settings_of_run(cuda=torch.cuda.is_available())
        with launch(settings.device, settings.process_timeout_seconds) as ranks:
            check_environment(("leaky_relu2_mlp", "newton_schulz"), ranks.device.type)
            check_environment(OPERATIONS[settings.quantizer], "cpu")  # there the first rank quantises
            with Run(settings, ranks) as run:
                run_training(settings, ranks, run)

    return ending("train_gpt.py", run_all) or 0


if __name__ == "__main__":
    sys.exit(main())
