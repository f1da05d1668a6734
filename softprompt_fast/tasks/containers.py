"""Items and rows out of the containers that people have them in: lists, arrays, columns, tables, datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import Examples, Rows
from .tables import from_dataset


def listed(values: Any, argument: str, what: str) -> list[Any]:
    """The items of any container by position; the rows of a table as mappings.

    Raises:
        TypeError: one string or mapping, no container, one without an order, or a table that names a column twice.
    """
    if isinstance(values, (str, bytes, Mapping, set, frozenset)):
        raise TypeError(f"`{argument}` must be a list of {what}, got one {type(values).__name__}")
    if hasattr(values, "features") and hasattr(values, "num_rows"):  # a dataset: numbers of classes become names
        return from_dataset(values, argument)
    columns: Any = getattr(values, "column_names", None) or getattr(values, "columns", ())
    names = [str(name) for name in columns]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"`{argument}` must name each column once, got {', '.join(double)} more than once")
    for method in ("to_dicts", "to_pylist"):  # polars' and pyarrow's tables
        if hasattr(values, method):
            return list(getattr(values, method)())
    if not hasattr(values, "__iter__"):
        raise TypeError(f"`{argument}` must be a list of {what}, got one {type(values).__name__}")
    if hasattr(values, "columns") and hasattr(values, "to_dict"):  # pandas
        return list(values.to_dict("records"))
    return list(values)


def as_rows(data: Any, argument: str = "rows") -> Examples:
    """Rows as a list of mappings, from a list, a table of pandas, polars or pyarrow, or a dataset.

    Raises:
        TypeError: another container, or rows that are no mappings.
    """
    rows = data if isinstance(data, Rows) else listed(data, argument, "rows")
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"`{argument}` must hold a mapping of columns in each row, got {type(row).__name__} in row {place}"
            )
    return rows
