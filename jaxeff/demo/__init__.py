"""The network that `jaxeff demo` trains, on scanned digits that come with the package."""

from jaxeff.demo._demo import ANALYZED as ANALYZED
from jaxeff.demo._demo import BATCH_SIZE as BATCH_SIZE
from jaxeff.demo._demo import EPOCHS as EPOCHS
from jaxeff.demo._demo import SEED as SEED
from jaxeff.demo._demo import SPARSITY as SPARSITY
from jaxeff.demo._demo import TEST_SIZE as TEST_SIZE
from jaxeff.demo._demo import DigitsCNN as DigitsCNN
from jaxeff.demo._demo import Epoch as Epoch
from jaxeff.demo._demo import Examples as Examples
from jaxeff.demo._demo import accuracy as accuracy
from jaxeff.demo._demo import create_state as create_state
from jaxeff.demo._demo import digits as digits
from jaxeff.demo._demo import run as run
from jaxeff.demo._demo import split as split
from jaxeff.demo._demo import train as train
from jaxeff.demo._demo import train_further as train_further
from jaxeff.demo._demo import train_pruned as train_pruned
