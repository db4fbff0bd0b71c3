"""Words pydantic's errors for the author of a YAML file: the key, what is wrong with it, and what would be right."""

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from agents.names import nearest


def complaint(error: dict[str, Any], root: type[BaseModel], also: Sequence[str] = ()) -> str:
    """Return an error of pydantic as one line.

    `root` is the model that the file was validated with. The file may have the keys in `also` too.
    """
    keys, section = _locate(error["loc"], root)
    place = ".".join(keys)
    if error["type"] == "extra_forbidden" and section is not None:
        known = [*section.model_fields, *(also if section is root else ())]
        return f"{place}: unknown key; {nearest(keys[-1], known)}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{place}: {message}" if place else message
    if error["type"] == "missing":
        return f"{place}: this key is required"
    given = "" if "env" in keys else f", not {error['input']!r}"  # which may be a secret
    return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}{given}"


def _locate(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the keys of a location, and the section that has the last one; None if that is in no section.

    Where a value has one of several types, pydantic's location also names the type. The keys do not.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = None
    kind: Any = root
    for step in location:
        kinds = _alternatives(kind)
        models = [each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)]
        if len(kinds) > 1:
            kind = models[0] if models else None
            continue
        keys.append(str(step))
        section = models[0] if models else None
        if section is not None:
            field = section.model_fields.get(str(step))
            kind = field.annotation if field else None
        else:
            values = [each for each in get_args(kinds[0]) if each is not ...]
            kind = values[-1] if values else None  # of a mapping, a list, or a tuple of one type
    return keys, section


def _alternatives(kind: Any) -> list[Any]:
    """Return the types that a value may have besides None."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [each for part in get_args(kind) if part is not type(None) for each in _alternatives(part)]
    return [kind]
