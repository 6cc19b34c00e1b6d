"""Advice as text, 100 columns wide, and as HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from jaxeff.advice._records import Findings, LayerAdvice, Removal
from jaxeff.output import text
from jaxeff.output.stacks import Stack, folded, rows_of
from jaxeff.report import Recommendation
from jaxeff.report._notebook import listed, paragraphs, table_of

SHOWN = 60
"""Rows of a table; a line below says how many were left out."""
MOST = 7
"""Recommendations."""
_SMALL = 100  # held-out examples below which an interval says little


def render(found: Findings) -> str:
    rows, left = _rows(found)
    lines = text.wrapped(headline(found), text.WIDTH)
    if rows:
        lines += ["", *text.aligned([_HEADER, *rows], text.WIDTH, left=("kind",)), *left]
    lines += text.section(text.WIDTH, "Recommendations:", [str(each) for each in recommendations(found)])
    lines += text.section(text.WIDTH, "Notes:", notes(found))
    return "\n".join(lines)


def html(found: Findings) -> str:
    """Return HTML for notebooks, in which every name is escaped."""
    rows, left = _rows(found)
    parts = [
        paragraphs([headline(found)]),
        table_of([_HEADER, *rows]) if rows else "",
        paragraphs(left),
        listed("Recommendations", [str(each) for each in recommendations(found)]),
        listed("Notes", notes(found)),
    ]
    return f"<div>{''.join(parts)}</div>"


def headline(found: Findings) -> str:
    return " ".join([_weights_sentence(found), *_units_sentence(found)])


def _weights_sentence(found: Findings) -> str:
    removal = found.weights
    if removal is None:
        tried = [point for point in found.tried if point.what == "weights" and point.criterion != "random"]
        least = min(tried, key=lambda point: point.fraction, default=None)
        if least is None:
            return "Nothing was measured yet of what weights can be zeroed."
        return (
            f"No weights can be zeroed at once within the tolerance of {_tolerance(found)}, as far as "
            f"{_examples(found)} tell: with {_share(least.fraction)} of them at 0, the least that was "
            f"tried, {_change(found, _risen(found, least.loss))}, and {_change(found, _risen(found, least.bound))} "
            "with its standard error."
        )
    can = _verdict(found, removal, "can be zeroed at once", "at 0")
    return f"{_share(removal.fraction)} of the weights {can}: {_risen_text(found, removal)}, no faster."


def _units_sentence(found: Findings) -> list[str]:
    removal = found.units
    if removal is None:
        return []
    parts = [
        f"{_share(removed / total)} of the {_plural(kind)}"
        if kind != "block"
        else f"{removed} of {total} blocks"
        for kind, (removed, total) in removal.kinds.items()
        if removed
    ]
    can = _verdict(found, removal, "can be removed", "removed")
    return [f"{_joined(parts)} {can}: {_risen_text(found, removal)}, {_faster(removal)}."]


def _verdict(found: Findings, removal: Removal, can: str, gone: str) -> str:
    """Whether held-out examples stay within the tolerance too, may do so, or do not."""
    rise = removal.rise
    if rise.mean <= found.tolerance:
        return can
    others = "may not" if rise.low is not None and rise.low <= found.tolerance else "did not"
    return f"{gone} stayed within {_tolerance(found)} on {_examples(found)}, but {others} on others"


def _examples(found: Findings) -> str:
    return f"{found.searched:,} examples" if found.searched > 1 else "the examples of `evaluate`"


def _risen_text(found: Findings, removal: Removal) -> str:
    rise = removal.rise
    change = _change(found, rise.mean)
    if rise.low is None or rise.high is None:
        return change
    low, high = sorted([_signed(found, rise.mean, rise.low), _signed(found, rise.mean, rise.high)])
    examples = f"{rise.examples:,} held-out examples"
    return f"{change} ({_number(found, low)} to {_number(found, high)}) on {examples}"


def _faster(removal: Removal) -> str:
    if removal.measured is None:
        return "the time was not measured"
    (ratio,) = removal.measured.speedups
    if ratio.percentile_10 <= 1 <= ratio.percentile_90:
        spread = f"{ratio.percentile_10:.2f} to {ratio.percentile_90:.2f}"
        return f"no measurable difference in speed ({spread} times)"
    word = "faster" if ratio.median > 1 else "slower"
    return f"{max(ratio.median, 1 / ratio.median):.2f} times {word}"


def _signed(found: Findings, mean: float, rise: float) -> float:
    """A rise as it is shown: of the loss, or of a score by how much it is lower or higher."""
    return -rise if found.by_score and mean < 0 else rise


def _number(found: Findings, change: float) -> str:
    if _relative(found):
        return f"{100 * change:+.1f}"
    # All to the same place, hundredths of the tolerance.
    places = 2 - math.floor(math.log10(found.tolerance)) if found.tolerance else None
    shown = f"{change:+.3g}" if places is None else f"{change:+.{max(places, 0)}f}"
    return shown.removeprefix("+") if found.by_score else shown


def _relative(found: Findings) -> bool:
    return not found.by_score and found.dense != 0


def _change(found: Findings, rise: float) -> str:
    number = _number(found, _signed(found, rise, rise))
    if found.by_score:
        return f"score {'higher' if rise < 0 else 'lower'} by {number}"
    return f"loss {number}{' %' if _relative(found) else ''}"


def _risen(found: Findings, loss: float) -> float:
    return (loss - found.dense) / (abs(found.dense) if _relative(found) else 1)


def _tolerance(found: Findings) -> str:
    if found.by_score:
        return f"{found.tolerance:.3g} below the dense score"
    return f"{100 * found.tolerance:.3g} %"


def _share(fraction: float) -> str:
    percent = 100 * fraction
    if 0 < percent < 0.05:
        return "less than 0.1 %"
    return f"{percent:.1f} %" if percent < 10 or percent > 90 else f"{percent:.0f} %"


def _plural(kind: str) -> str:
    return {"kv_head": "key-value heads", "query": "query heads", "stream": "stream channels"}.get(
        kind, f"{kind}s"
    )


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_HEADER = ("layer", "kind", "size", "criterion", "alone", "jointly")


def _rows(found: Findings) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows, one for each layer or for all blocks of a deep model, and the lines below them."""
    stacks = rows_of(_named(found.layers))
    kept = stacks[:SHOWN]
    rows = [_row(stack, [found.layers[index] for index in stack.members]) for stack in kept]
    several = any(len(stack.members) > 1 for stack in kept)
    legend = (
        ["A row of several blocks holds their sizes together, and the range of the rest."] if several else []
    )
    return rows, [*text.left_out(len(stacks), len(kept), "rows"), *legend]


def _named(layers: Sequence[LayerAdvice]) -> list[tuple[str, Hashable]]:
    return [(layer.path, (layer.kind, layer.size, layer.criterion)) for layer in layers]


def _row(stack: Stack, layers: Sequence[LayerAdvice]) -> tuple[str, ...]:
    return (
        stack.label,
        layers[0].kind,
        text.number(sum(layer.size for layer in layers)),
        layers[0].criterion,
        # Few fractions were tried of a layer alone.
        _range([layer.alone for layer in layers], "{:.0%}".format),
        _range([layer.jointly for layer in layers], text.percent),
    )


def _range(values: Sequence[float | None], formatted: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return text.ranged(known, formatted) if known else text.UNKNOWN


def recommendations(found: Findings) -> tuple[Recommendation, ...]:
    """Return what to do, each with what was measured: at most seven, the most far-reaching first."""
    advice = [*_to_remove(found), *_to_zero(found), *_about_order(found), *_about_layers(found)]
    return tuple(advice[:MOST])


def _to_remove(found: Findings) -> list[Recommendation]:
    removal = found.units
    if removal is None:
        return []
    evidence = {"rise": removal.rise.mean, "searched_rise": removal.search_rise}
    saved: dict[str, int | None] = {}
    what = ""
    if (measured := removal.measured) is not None:
        saved = {
            "saved_macs": (measured.before.macs[0] - measured.after.macs[0])
            // (measured.batch_sizes[0] or 1),
            "saved_bytes": measured.before.bytes - measured.after.bytes,
        }
        fewer = 1 - measured.after.parameters / max(measured.before.parameters, 1)
        evidence["speedup"] = measured.speedups[0].median
        what = f": {_share(fewer)} fewer parameters, {_faster(removal)}"
    message = f"`prune.compact(params, apply_fn, batch, advice.plan)` makes the smaller network{what}."
    return [Recommendation("remove units", None, message, evidence, **saved)]


def _to_zero(found: Findings) -> list[Recommendation]:
    removal = found.weights
    if removal is None:
        return []
    even = removal.starts.get("uniform")
    if even is None:  # interrupted before that
        gain = ""
    elif removal.fraction > even + 0.005:
        gain = f" The same fraction of each layer reaches {_share(even)} within the tolerance."
    else:
        gain = " The same fraction of each layer goes as far."
    message = (
        f"`prune.apply(params, advice.masks)` zeroes {removal.removed:,} of {removal.total:,} weights, by "
        f"{removal.criterion}.{gain} Nothing was retrained: training under masks goes further "
        "(`prune.sparsify`)."
    )
    evidence = {"fraction": removal.fraction, **({} if even is None else {"uniform": even})}
    return [Recommendation("zero weights", None, message, evidence)]


def _about_order(found: Findings) -> list[Recommendation]:
    known = {name: reached for name, reached in found.reached.items() if name != "random"}
    if not known or "random" not in found.reached or not max(known.values()):
        return []
    ranked = sorted(known, key=lambda name: -known[name])
    reached = ", ".join(f"{name} {_share(known[name])}" for name in ranked)
    random = found.reached["random"]
    message = (
        f"order weights by {ranked[0]}: largest fraction found within the tolerance by {reached}; at random "
        f"{_share(random)}."
    )
    if random >= known[ranked[0]]:
        message += (
            " No criterion goes further than chance, as in an untrained network: the order says nothing about what "
            "these weights are worth."
        )
    return [Recommendation("criterion", None, message, dict(found.reached))]


def _about_layers(found: Findings) -> list[Recommendation]:
    """Where the most can go, and which layers bear least."""
    layers = [layer for layer in found.layers if layer.kind == "weights"]
    total = sum(layer.size for layer in layers)
    stacks = folded(_named(layers))
    said = [_about(stack.label, [layers[at] for at in stack.members], total) for stack in stacks]
    known = [each for each in said if each is not None and each[0] >= 0.001 * total]
    ranked = sorted(known, key=lambda each: -each[0]) if len(stacks) > 1 else []
    return [recommendation for _, recommendation in ranked]


def _about(path: str, layers: Sequence[LayerAdvice], total: int) -> tuple[float, Recommendation] | None:
    """Return how many weights it is about, and what to do with these layers; None if that was not measured."""
    size = sum(layer.size for layer in layers)
    alone = [layer.alone for layer in layers if layer.alone is not None]
    jointly = [layer.jointly for layer in layers if layer.jointly is not None]
    gone = float(np.mean(jointly)) if jointly else 0.0
    if gone:
        message = (
            f"{_share(gone)} goes in the joint allocation, {_share(gone * size / total)} of all "
            f"weights{_alone(alone)}."
        )
        return gone * size, Recommendation("layer", path, message, {"jointly": gone})
    if alone and max(alone) == 0:
        message = (
            "pruned alone, it exceeds the tolerance at every sparsity that was measured: leave it whole."
        )
        return size, Recommendation("keep", path, message, {"jointly": gone})
    return None


def _alone(alone: Sequence[float]) -> str:
    if not alone:
        return ""
    it_bears = "it bears" if len(alone) == 1 else "its layers bear"
    return f"; alone {it_bears} {text.ranged([100 * share for share in alone], '{:.0f}'.format, ' to ')} %"


def _tried_alone(sparsities: Sequence[float]) -> str:
    return _joined([f"{100 * sparsity:.0f} %" for sparsity in (0, *sparsities)])


def notes(found: Findings) -> list[str]:
    """Return what readers must know about the numbers."""
    measured = [removal for removal in (found.weights, found.units) if removal is not None]
    said = []
    if found.interrupted:
        said.append(f"Interrupted {found.interrupted}: this is what was found until then.")
    said += found.notes
    if found.held_out:
        said.append(
            f"In brackets: 95 % paired bootstrap over {found.held_out:,} examples that the search did not see. "
            f"The search allowed {_tolerance(found)} on {found.searched:,} others, one standard error included."
        )
    elif found.by_score:
        said.append(
            "`evaluate` gave one number, so there is no interval, and the search saw all of its examples: "
            "return one score for each example to have both."
        )
    for removal in measured:
        said += _doubts(found, removal)
    if found.sensitivity is not None:
        said.append(
            f"alone: of {_tried_alone(found.sensitivity.sparsities)}, the largest up to which the "
            f"{'score' if found.by_score else 'loss'} stays within the tolerance with the other layers whole. jointly: "
            "its fraction when all are pruned together."
        )
    said.append(f"Cost: {found.forwards} forward passes (a gradient counts three), {found.seconds:.1f} s.")
    return said


def _doubts(found: Findings, removal: Removal) -> list[str]:
    rise, what = removal.rise, removal.what
    if rise.low is None or rise.high is None:
        return []
    wide = (rise.high - rise.low) / 2 > found.tolerance
    few = rise.examples < _SMALL
    said = []
    if rise.low > found.tolerance:
        said.append(
            f"Without these {what} the {'score falls' if found.by_score else 'loss rises'} by more than the tolerance "
            "on held-out examples, to which the search did not fit itself: search with more examples, or a smaller "
            "tolerance."
        )
    if wide or few:
        width = _number(found, rise.high - rise.low).lstrip("+") + (" %" if _relative(found) else "")
        said.append(
            f"The interval for {what} is {width} wide on {rise.examples:,} held-out examples"
            + (", wider than the tolerance" if wide else "")
            + (": pass more." if wide else "; with so few it may itself be too narrow.")
        )
    return said
