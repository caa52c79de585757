"""A short visit to a machine with a GPU: what `bench/gpu.sh` runs. It brings facts home though half of it fails.

visit        the clock: starts the parts, hands out the turns, ends what takes too long
plan         the parts, in the order of their turns; `operations` are the benchmarks of bench/, a process each
facts        one JSON line a fact, whole whatever is killed
turns        only one process times at a time
wheels       packages for a machine without a network
machine      part: what the machine and its Python have; the native build
ceilings     part: what needs nothing of ours: copies, products at the step's shapes, attention, launches
correctness  part: the GPU tests, in several processes
step         part: the record's training step and its profile
sweeps       part: launch parameters, and the tables that they make
candidates   the launches that a sweep tries
sweep_calls  the launchers that it times, on the inputs that they have in the step
compiled_ahead  kernels compiled by other processes before they are launched, or with no GPU at all
predictions  what the figures were expected to be: bench/predictions.json
estimates    how that was reckoned
report       from facts to results
"""
