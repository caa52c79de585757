"""What a program needs of its surroundings, and nothing of models.

checkout     where a package that runs from a checkout finds its kernels and its extension
clock        how long training took so far, and how many more steps there is time for
doctor       what this machine has and lacks
files        files that are written whole or not at all
host         cores for this process, and a CUDA compiler
machine      dtype, CPU levels, streams, limits of compilation
probes       plain facts about this machine
progress     a bar when a person is watching
ranks        the processes of a run
sources      where this installation keeps the sources
torch_file   files of torch.save, read as data
tried        the versions that the tests ran with
utilisation  time, memory and share of its peak that training took of a device
versions     which code and which libraries
"""
