"""What a PromQL query names: metrics, labels and label values. A query is checked against the samples of a service."""

import re
from collections.abc import Iterator, Mapping

Samples = Mapping[str, Mapping[str, set[str]]]
"""The values of each label, by the name of the sample."""

_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])\s*(?:\{([^}]*)\}|(?!\s*\())")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_OPERATORS = {"and", "or", "unless", "bool", "offset"}
_PLACEHOLDER = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


def faults(query: str, samples: Samples, text: str = "") -> Iterator[str]:
    """Yield each metric, label and label value of a query that no sample has.

    `text` is a legend or an annotation; the labels in its placeholders must exist as well.
    """
    plain = _RANGE.sub("", query)
    grouped = [label.strip() for labels in _GROUPING.findall(plain) for label in labels.split(",") if label.strip()]
    found = [(name, inside) for name, inside in _SELECTOR.findall(_GROUPING.sub("", plain)) if name not in _OPERATORS]
    if not found:
        yield f"no metric in {query!r}"
    for name, inside in found:
        if name not in samples:
            yield f"no metric {name!r}"
            continue
        for label in (*grouped, *_PLACEHOLDER.findall(text)):
            if label not in samples[name]:
                yield f"{name} has no label {label!r}"
        for label, operator, value in _MATCHER.findall(inside):
            for choice in value.split("|") if "~" in operator else (value,):
                if choice not in samples[name].get(label, ()):
                    yield f"{name} has no {label}={choice!r}"
