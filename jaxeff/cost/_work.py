"""The work of one operation, in numbers that add."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxeff.output.text import number


@dataclasses.dataclass(frozen=True)
class Work:
    """Exact integers (or floats, for shares of a batch that are not whole).

    Attributes:
        macs: multiply-accumulates of dot products, convolutions and ragged products, of any dtype.
        flops: floating-point operations: two per multiply-accumulate, and one per element of a floating
            addition, multiplication, division, comparison, selection or reduction.
        transcendentals: elements of exp, log, tanh, sqrt and the like. They are not FLOPs, since their cost
            depends on the device; XLA keeps them apart as well.
        integer_operations: elements of arithmetic on integers and booleans (masks, indices). They are not FLOPs.
        padding_macs: the part of `macs` that multiplies the zeros of a convolution's padding.
    """

    macs: int = 0
    flops: int = 0
    transcendentals: int = 0
    integer_operations: int = 0
    padding_macs: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(number * times for number in self.numbers))

    def __truediv__(self, parts: int) -> Work:
        return Work(*(_divided(number, parts) for number in self.numbers))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The five numbers, in order."""
        # dataclasses.astuple would copy deeply, and this runs for every operation of a program.
        return self.macs, self.flops, self.transcendentals, self.integer_operations, self.padding_macs

    @property
    def weight(self) -> int:
        """FLOPs and transcendentals together, by which branches are compared."""
        return self.flops + self.transcendentals


def _divided(number: int, parts: int) -> Any:
    # A float if the parts are not whole, as an optimizer's update is not per example.
    return number // parts if number % parts == 0 else number / parts


def amounts(work: Work) -> str:
    """Return multiply-accumulates and FLOPs in words."""
    return f"{number(work.macs)} MACs, {number(work.flops)} FLOPs"
