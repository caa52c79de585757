"""A made-up repository with a dataset, as the community publishes them, and changes to it."""

import json
from pathlib import Path

REPO = "somebody/a-dataset"
NAME = "fineweb10B_sp1024"


def change_manifest(remote: Path, change) -> None:
    manifest = {
        "datasets": [
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
            {
                "name": NAME,
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 2, "files_val": 1},
            },
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    change(manifest)
    (remote / "datasets" / "manifest.json").write_text(json.dumps(manifest))


def damage_file(remote: Path, name: str, damage) -> None:
    path = remote / "datasets" / "datasets" / NAME / name
    path.write_bytes(damage(path.read_bytes()))
