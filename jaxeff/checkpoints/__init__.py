"""Checkpoints without the code of their model: files in, reports out, an array at a time.

path -> opening (safetensors, orbax, msgpack: names and shapes)
     -> reading (pieces of a large array, small arrays together) -> counting, measuring (in NumPy)
     -> analysis: a Report; comparing: two checkpoints
"""

from jaxeff.checkpoints._analysis import analyze_checkpoint as analyze_checkpoint
from jaxeff.checkpoints._comparing import compare_checkpoints as compare_checkpoints
from jaxeff.checkpoints._opening import open_checkpoint as open_checkpoint
from jaxeff.checkpoints._stored import CheckpointError as CheckpointError
