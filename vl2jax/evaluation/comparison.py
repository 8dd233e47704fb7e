"""Compares the scores of a model with those of the same model with quantised weights."""

from collections.abc import Callable, Mapping
from typing import Any


def difference(whole: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Subtracts the scores of `whole` from those of `other`.

    Args:
      whole, other: `families` and `summary` for the same questions, as in scores.json.

    Returns:
      `families` and `summary` with the difference of each measure; None if a measure is undefined.
    """
    families = {}
    for name, measures in whole["families"].items():
        pairs = {key: (value, other["families"][name][key]) for key, value in measures.items()}
        del pairs["questions"]
        families[name] = {
            key: None if None in pair else pair[1] - pair[0] for key, pair in pairs.items()
        }
    summary = {
        key: other["summary"][key]["value"] - found["value"]
        for key, found in whole["summary"].items()
    }
    return {"families": families, "summary": summary}


def side_by_side(
    scores: Mapping[str, Any],
    kind: str,
    measures: Mapping[str, str],
    figure: Callable[[str, float], str],
) -> str:
    """Formats a table with both scores and their difference.

    Args:
      scores: content of scores.json, including the scores of `kind` and the `difference`.
      kind: kind of quantisation.
      measures: names of the measures, by key.
      figure: formats a value: (key, value) -> text.
    """
    other, more = scores[kind], scores["difference"]

    def line(name: str, key: str, before: float, after: float, change: float) -> str:
        shown = figure(key, abs(change))
        sign = "" if shown.strip("0.%") == "" else "-" if change < 0 else "+"
        cells = (figure(key, before), figure(key, after), sign + shown)
        return f"{name:18}{measures[key]:>13}" + "".join(f"{cell:>13}" for cell in cells)

    lines = [f"{'family':18}{'measure':>13}{'unquantised':>13}{kind:>13}{'difference':>13}"]
    for name, found in scores["families"].items():
        after, change = other["families"][name], more["families"][name]
        lines += [
            line(name, key, found[key], after[key], change[key])
            for key in measures
            if found[key] is not None and after[key] is not None
        ]
    for key, found in scores["summary"].items():
        after, change = other["summary"][key]["value"], more["summary"][key]
        lines.append(line("over families", key, found["value"], after, change))
    lines.append(f"same answers: {other['same_answers']} of {scores['questions']}")
    return "\n".join(lines)
