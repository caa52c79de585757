"""A short visit to a machine with a GPU: what `bench/gpu.sh` runs. It brings facts home though half of it fails.

visit        the plan and its clock: starts the parts, hands out the turns, ends what takes too long
facts        one JSON line a fact, whole whatever is killed
turns        only one process times at a time
machine      part: what the machine and its Python have
ceilings     part: what needs nothing of ours: copies, products at the step's shapes, attention, launches
correctness  part: the GPU tests, in several processes
step         part: the record's training step and its profile
operations   part: an operation beside torch.compile and eager
sweeps       part: launch parameters, and the tables that they make
"""
