"""From a fresh model to trained weights.

averaging          averages of the weights over training
checkpoint         a run's checkpoints, and the only place that knows their format
checkpoint_writer  when they are written: beside training
cuda_graphs        forward and backward captured once
losses             what training minimises
muon               Muon
optim              one optimizer step over all ranks
qat                quantization-aware training
recorder           to whom training tells what happens, and how it ends early
schedule           what changes during training
sharding           which rank works on which matrices
step_budget        how many steps until the ranks next synchronise
train_log          lines and metrics about single steps
trainer            the loop
"""
