"""One file a kind of attack; `python bench/studies/attack.py` runs them."""
