"""Importance scores, one per weight, by published criteria or your own; also per unit, head or layer."""

from jaxeff.importance._criteria import CRITERIA as CRITERIA
from jaxeff.importance._criteria import Criterion as Criterion
from jaxeff.importance._criteria import Score as Score
from jaxeff.importance._criteria import activation as activation
from jaxeff.importance._criteria import filter_norm as filter_norm
from jaxeff.importance._criteria import fisher as fisher
from jaxeff.importance._criteria import gradient as gradient
from jaxeff.importance._criteria import grasp as grasp
from jaxeff.importance._criteria import lrp as lrp
from jaxeff.importance._criteria import lrp_alpha_beta as lrp_alpha_beta
from jaxeff.importance._criteria import magnitude as magnitude
from jaxeff.importance._criteria import named as named
from jaxeff.importance._criteria import obd as obd
from jaxeff.importance._criteria import obd_gauss_newton as obd_gauss_newton
from jaxeff.importance._criteria import random as random
from jaxeff.importance._criteria import ria as ria
from jaxeff.importance._criteria import snip as snip
from jaxeff.importance._criteria import synflow as synflow
from jaxeff.importance._criteria import taylor as taylor
from jaxeff.importance._criteria import unit_taylor as unit_taylor
from jaxeff.importance._criteria import wanda as wanda
from jaxeff.importance._ranks import correlation as correlation
from jaxeff.importance._ranks import ranks as ranks
from jaxeff.importance._scores import missing as missing
from jaxeff.importance._scores import score as score
from jaxeff.importance._scores import scores as scores
