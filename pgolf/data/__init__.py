"""Text in, token shards out: the demo corpus, tokenizers, the community's shard format, and the batch loader."""
