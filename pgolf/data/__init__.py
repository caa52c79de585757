"""Data: shards, tokenizers, corpora, loaders."""
