"""One file a kind of attack; `python -m bench.studies.attack` runs them."""
