"""Scores of a model beside those of the same model with quantised weights."""

from collections.abc import Callable, Mapping
from typing import Any


def difference(whole: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What each measure of `other` has more than `whole`, family by family, and in summary.

    Args:
      whole, other: `families` and `summary` of the same questions, as scores.json has them.
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
    """Both columns and the difference, for people.

    Args:
      scores: as scores.json has them, with those of `kind` and the `difference`.
      kind: of quantisation.
      measures: key -> name.
      figure: (key, value) -> how it is written.
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
