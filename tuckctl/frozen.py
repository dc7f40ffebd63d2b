# SPDX-License-Identifier: Apache-2.0
"""Frozen classes that cost nothing to define, and others of which only the constructor is made for them.

dataclasses compiles several functions for each class: for ours, that took longer than a swap, each
time the command line started. These share theirs. The frozen ones are dataclasses to whoever asks.
"""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

_T = TypeVar("_T")


class _Fields:
    """The fields as dataclasses.fields, replace and asdict want them, made when one of them is called."""

    def __get__(self, instance: object, owner: Any) -> Any:
        from dataclasses import field, make_dataclass  # noqa: PLC0415 - nobody else needs it
        from functools import partial  # noqa: PLC0415

        defaults, names = owner._frozen_defaults, owner.__match_args__  # noqa: SLF001 - our own
        fields = []
        for name in names:
            default = field(default_factory=partial(defaults.get, name)) if name in defaults else field()
            fields.append((name, owner.__annotations__[name], default))
        made = make_dataclass(owner.__name__, fields, init=False, repr=False, eq=False)
        owner.__dataclass_fields__ = made.__dataclass_fields__  # type: ignore[attr-defined]
        return owner.__dataclass_fields__


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = self.__match_args__
    have = self.__dict__
    if len(values) == len(names) and not named:
        have.update(zip(names, values, strict=True))
        return
    have.update(self._frozen_defaults)
    have.update(zip(names, values, strict=False))
    have.update(named)
    if len(have) != len(names) or len(values) > len(names) or not set(names[len(values) :]).issuperset(named):
        have.clear()
        msg = (
            f"{type(self).__name__}({', '.join(names)}): got {len(values)} values and {', '.join(named) or 'no names'}"
        )
        raise TypeError(msg)


def _values(self: Any) -> tuple[Any, ...]:
    return tuple(map(self.__dict__.__getitem__, self.__match_args__))


def _eq(self: Any, other: object) -> bool:
    return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={value!r}" for name, value in zip(self.__match_args__, _values(self), strict=True))
    return f"{type(self).__qualname__}({shown})"


def _refuse(_self: object, name: str, _value: object = None) -> None:
    from dataclasses import FrozenInstanceError  # noqa: PLC0415 - only for who tries

    raise FrozenInstanceError(name)


_METHODS = {
    "__init__": _init,
    "__eq__": _eq,
    "__hash__": _hash,
    "__repr__": _repr,
    "__setattr__": _refuse,
    "__delattr__": _refuse,
    "__dataclass_fields__": _Fields(),
}


def _with_fields(cls: type[_T]) -> type[_T]:
    names = tuple(cls.__annotations__)
    setattr(cls, "__match_args__", names)  # noqa: B010 - no class declares it
    setattr(cls, "_frozen_defaults", {name: vars(cls)[name] for name in names if name in vars(cls)})  # noqa: B010
    return cls


@dataclass_transform(frozen_default=True)
def frozen(cls: type[_T]) -> type[_T]:
    """Make a class's annotated names its fields, given in their order or by name, and unchangeable."""
    for name, method in _METHODS.items():
        setattr(cls, name, method)
    return _with_fields(cls)


@dataclass_transform(eq_default=False)
def changeable(cls: type[_T]) -> type[_T]:
    """Make a class's annotated names what its constructor takes, in their order or by name; each is only itself."""
    setattr(cls, "__init__", _init)  # noqa: B010 - no class declares it
    return _with_fields(cls)


def replace(instance: _T, **changes: Any) -> _T:
    """Return a copy with some fields changed, as dataclasses.replace does; of a class of either kind."""
    return type(instance)(**{**vars(instance), **changes})


def fields_of(instance: object) -> dict[str, Any]:
    """Return the fields by name, in their order; of a class of either kind."""
    return {name: getattr(instance, name) for name in type(instance).__match_args__}  # type: ignore[attr-defined]
