"""Scores: bits per byte of a validation split.

ngram        scoring with the n-gram cache on top of the model
ngram_cache  the causal n-gram cache
scoring      bits per byte, the sums in float64
stored_scoring  how an artifact wants to be scored
windows      which tokens each target is predicted from
"""
