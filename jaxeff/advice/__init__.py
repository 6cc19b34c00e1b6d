"""Advice that was measured: how much of a network can go at once, and what that does to its loss."""

from jaxeff.advice._advice import Advice as Advice
from jaxeff.advice._interval import Rise as Rise
from jaxeff.advice._records import LayerAdvice as LayerAdvice
from jaxeff.advice._records import Removal as Removal
from jaxeff.advice._records import Tried as Tried
