"""Singular values of a model's weights, each number beside what random numbers would give."""

from jaxeff.spectral._null import Expected as Expected
from jaxeff.spectral._null import SpectralNull as SpectralNull
from jaxeff.spectral._records import Spectrum as Spectrum
from jaxeff.spectral._result import Spectra as Spectra
from jaxeff.spectral._spectra import spectra as spectra
