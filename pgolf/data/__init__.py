"""Text in, batches of tokens out.

batch      one rank's part of a training batch, and its micro-batches
corpus     the demo's text, which every Python installation carries
dataset    the opened data of one run: training shards, validation split, bytes of its tokens
documents  batches of whole documents
download   FineWeb shards as the community publishes them
inspect    what a folder of shards holds, and what is wrong with it
loader     batches of windows of the shards
prefetch   batches made ready in a thread
prepare    from text to a tokenizer and shards
shards     the community's shard format
spool      documents on disk that are used like a list
texts      documents out of files, folders, JSONL and standard input
tokenizer  SentencePiece, and the bytes of each token
"""
