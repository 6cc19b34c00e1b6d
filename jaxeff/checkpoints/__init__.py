"""Checkpoint files, read one array at a time without the code of their model, and written.

path -> opening (safetensors, orbax, msgpack: names and shapes)
     -> reading (pieces of a large array, small arrays together) -> counting, measuring (in NumPy)
     -> analysis: a Report; comparing: two checkpoints
     -> writing: a copy with zeros, or the arrays of a smaller model with the sizes in its config
"""

from jaxeff.checkpoints._analysis import analyze_checkpoint as analyze_checkpoint
from jaxeff.checkpoints._comparing import compare_checkpoints as compare_checkpoints
from jaxeff.checkpoints._opening import open_checkpoint as open_checkpoint
from jaxeff.checkpoints._stored import CheckpointError as CheckpointError
from jaxeff.checkpoints._writing import prune_checkpoint as prune_checkpoint
from jaxeff.checkpoints._writing import write_checkpoint as write_checkpoint
