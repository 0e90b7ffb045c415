"""What a handler may do, read off its source: which effects it can return, and which business status it can set.

Handlers are Python, so nobody can know what one returns before it runs. But most say it in plain words:
`send("service:payments", ...)`, `saga.state = replace(saga.state, status="paid")`. This reads those words:

- calls of the effect helpers, under whatever name they were imported, with what can be told of their target, message or
  child: text, a name that stands for it in the module, a message class, `event` itself;
- assignments to `saga.state` and what they say of the field `status`;
- the same in functions of the program's own that the handler calls by name.

What it cannot read is a *blind spot*, with its place: a target that is computed, a function that is not found, a state
whose status is an expression. Whoever draws conclusions has to ask for these first. Every branch of a handler counts as
possible; conditions are not evaluated, and nothing is run.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from sagaloom import effects
from sagaloom.codec import is_declared_class
from sagaloom.definitions import SagaDefinition
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage, message_type_of

__all__ = ["OWN_MESSAGE", "BlindSpot", "ForeseenEffect", "ForeseenStatus", "Foresight", "Place", "foresee", "place_of"]

EffectKind = Literal["send", "scheduled", "spawn", "complete", "fail", "compensate", "cancel_scheduled"]
OWN_MESSAGE: Final = "*"
"""Stands for the type of the very message that a handler handles, and for all steps after `saga_compensate`."""

_DEPTH_MAX: Final = 6
_HELPERS: Final[Mapping[object, EffectKind]] = {
    effects.send: "send",
    effects.schedule: "scheduled",
    effects.spawn: "spawn",
    effects.saga_complete: "complete",
    effects.saga_fail: "fail",
    effects.saga_compensate: "compensate",
    effects.cancel_scheduled: "cancel_scheduled",
}
_HARMLESS: Final[tuple[object, ...]] = (effects.answer, list, tuple, sorted)
"""What may stand where effects are returned and is none that leads anywhere; what lists are made of is read anyway."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line of a file; line 0 is the file as a whole."""

    file: str
    line: int

    def __str__(self) -> str:
        path = Path(self.file)
        line = f":{self.line}" if self.line else ""
        try:
            return f"{path.relative_to(Path.cwd())}{line}"
        except ValueError:
            return f"{path}{line}"


@dataclass(frozen=True, slots=True)
class ForeseenEffect:
    """An effect that a handler may return. What is None could not be read, or does not apply to its kind.

    `target` is `(kind, id)` of a send, whose id may be None alone; `message` the type that is scheduled or compensated,
    or `OWN_MESSAGE`; `child` the saga that is spawned; `is_all_steps` belongs to a compensation."""

    kind: EffectKind
    place: Place
    target: tuple[str, str | None] | None = None
    message: str | None = None
    child: str | None = None
    is_all_steps: bool = False


@dataclass(frozen=True, slots=True)
class ForeseenStatus:
    """A business status that a handler may set."""

    status: str
    place: Place


@dataclass(frozen=True, slots=True)
class BlindSpot:
    """Something that could not be read. `hides` says what may be behind it."""

    place: Place
    why: str
    hides: Literal["effects", "status"]


@dataclass(frozen=True, slots=True)
class Foresight:
    """All that could be read of one handler."""

    place: Place
    effects: tuple[ForeseenEffect, ...] = ()
    statuses: tuple[ForeseenStatus, ...] = ()
    blind_spots: tuple[BlindSpot, ...] = ()

    def may(self, *kinds: EffectKind) -> bool:
        """Whether an effect of one of these kinds was seen."""
        return any(one.kind in kinds for one in self.effects)

    @property
    def sees_effects(self) -> bool:
        """Whether the effects are all there are."""
        return not any(one.hides == "effects" for one in self.blind_spots)

    @property
    def sees_statuses(self) -> bool:
        """Whether the statuses are all there are."""
        return not any(one.hides == "status" for one in self.blind_spots)


def place_of(function: Callable[..., object]) -> Place:
    """Where a function is defined."""
    code = _plain(function)
    return Place("<unknown>", 0) if code is None else Place(code.__code__.co_filename, code.__code__.co_firstlineno)


@functools.lru_cache(maxsize=1024)
def foresee(handler: Callable[..., object], status_field: str = "status") -> Foresight:
    """What `handler`, which takes (saga, event, context), may do. `status_field` is the field of its state that a
    business status stands in.

    >>> from sagaloom import send
    >>> def placed(saga, event, context):
    ...     return [send("service:payments", {})]
    >>> [effect.target for effect in foresee(placed).effects]  # a doctest has no file to read
    []
    """
    function = _plain(handler)
    place = place_of(handler)
    if function is None:
        return Foresight(place, blind_spots=_all_blind(place, f"{handler!r:.80} is no function that could be read"))
    reader = _Reader(status_field)
    parameters = list(inspect.signature(function).parameters)
    if inspect.ismethod(handler):
        parameters = parameters[1:]
    roles = dict(zip(parameters, ("saga", "event", "context"), strict=False))
    reader.read(function, roles, depth=0)
    return Foresight(
        place,
        tuple(dict.fromkeys(reader.effects)),
        tuple(dict.fromkeys(reader.statuses)),
        tuple(dict.fromkeys(reader.blind_spots)),
    )


# --- Reading a function ----------------------------------------------------------------------------------------------

_Function: TypeAlias = types.FunctionType
_Node: TypeAlias = ast.FunctionDef | ast.Lambda


class _Unknown:
    """The value of what could not be resolved."""


_UNKNOWN: Final = _Unknown()


class _Reader:
    """Reads a handler and the functions it calls, and collects."""

    def __init__(self, status_field: str) -> None:
        self.status_field = status_field
        self.effects: list[ForeseenEffect] = []
        self.statuses: list[ForeseenStatus] = []
        self.blind_spots: list[BlindSpot] = []
        self._read: set[tuple[_Function, tuple[tuple[str, str], ...], bool]] = set()

    def read(self, function: _Function, roles: Mapping[str, str], *, depth: int, gives_effects: bool = True) -> None:
        """`gives_effects`: what it returns is what the handler returns, or part of it."""
        mark = (function, tuple(sorted(roles.items())), gives_effects)
        if mark in self._read:
            return
        self._read.add(mark)
        place = Place(function.__code__.co_filename, function.__code__.co_firstlineno)
        node = _node_of(function)
        if node is None:
            self.blind_spots += _all_blind(place, f"the source of {function.__qualname__} is not there to be read")
            return
        _FunctionReader(self, function, node, roles, depth).read(gives_effects=gives_effects)


class _FunctionReader:
    """Reads one function. `roles` says which of its parameters are the handler's saga, event and context."""

    def __init__(self, reader: _Reader, function: _Function, node: _Node, roles: Mapping[str, str], depth: int) -> None:
        self._reader = reader
        self._status_field = reader.status_field
        self._function = function
        self._node = node
        self._roles = roles
        self._depth = depth
        self._file = function.__code__.co_filename
        self._locals = _assigned_once(node)
        self._hidden = _bound_in(node) - self._locals.keys()
        self._returning: set[int] = set()
        """The calls whose answer is returned."""

    def read(self, *, gives_effects: bool) -> None:
        if gives_effects:
            returned = [found.value for found in _inside(self._node) if isinstance(found, ast.Return)]
            for value in [self._node.body] if isinstance(self._node, ast.Lambda) else returned:
                if value is not None:
                    self._returned(value)
        for found in _inside(self._node):
            if isinstance(found, ast.Call):
                self._call(found)
            elif isinstance(found, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                self._assignment(found)

    # -- effects

    def _call(self, call: ast.Call) -> None:
        called = self._value(call.func)
        kind = _HELPERS.get(called) if isinstance(called, types.FunctionType) else None
        if kind is not None:
            self._reader.effects.append(self._effect(kind, call))
        elif isinstance(called, types.FunctionType):
            self._follow(called, call)
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "update" and self._is_state(call.func.value):
            for keyword in call.keywords:
                if keyword.arg == self._status_field:
                    self._status(keyword.value)
            for argument in call.args:
                self._state(argument, keeps=True)

    def _follow(self, called: _Function, call: ast.Call) -> None:
        """Reads a function of the same program, with the roles of what it is given."""
        is_ours = called.__module__.partition(".")[0] == self._function.__module__.partition(".")[0]
        if not is_ours or self._depth >= _DEPTH_MAX:
            return
        names = list(called.__code__.co_varnames[: called.__code__.co_argcount + called.__code__.co_kwonlyargcount])
        given = [*zip(names, call.args, strict=False), *((one.arg or "", one.value) for one in call.keywords)]
        roles = {
            name: role
            for name, argument in given
            if isinstance(argument, ast.Name) and (role := self._roles.get(argument.id)) is not None
        }
        self._reader.read(called, roles, depth=self._depth + 1, gives_effects=id(call) in self._returning)

    def _effect(self, kind: EffectKind, call: ast.Call) -> ForeseenEffect:
        place = self._place(call)
        first = call.args[0] if call.args else None
        named = {one.arg: one.value for one in call.keywords}
        match kind:
            case "send":
                target = self._target(first if first is not None else named.get("target"))
                if target is None:
                    self._blind(call, "the target of send(...) is computed", "effects")
                return ForeseenEffect(kind, place, target=target)
            case "scheduled" | "compensate":
                given = first if first is not None else named.get("message")
                if given is not None and isinstance(self._value(given), effects.AllSteps):
                    return ForeseenEffect(kind, place, is_all_steps=True)
                message = self._message(given)
                if message is None:
                    what = "schedule" if kind == "scheduled" else "saga_compensate"
                    self._blind(call, f"the message of {what}(...) is computed", "effects")
                return ForeseenEffect(kind, place, message=message)
            case "spawn":
                child = self._value(first if first is not None else named.get("child"))
                name = child.id if isinstance(child, SagaDefinition) else child
                if not isinstance(name, str):
                    self._blind(call, "the child of spawn(...) is computed", "effects")
                return ForeseenEffect(kind, place, child=name if isinstance(name, str) else None)
            case _:
                return ForeseenEffect(kind, place)

    def _target(self, node: ast.expr | None) -> tuple[str, str | None] | None:
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            kind, separator, _ = str(node.values[0].value).partition(":")
            return (kind, None) if separator and kind else None
        value = self._value(node)
        if isinstance(node, ast.Dict):
            fields = self._fields(node)
            named, identifier = self._value(fields.get("kind")), self._value(fields.get("id"))
            if isinstance(named, str) and not isinstance(identifier, str):
                return ("saga" if named == "message" else named), None
            value = {"kind": named, "id": identifier}
        if isinstance(node, ast.Call) and self._value(node.func) is effects.Target:
            parts = [self._value(one) for one in (*node.args, *(each.value for each in node.keywords))]
            if len(parts) == 2 and all(isinstance(one, str) for one in parts):
                value = effects.Target(str(parts[0]), str(parts[1]))
        try:
            read = effects.send(cast("Any", value), {})
        except SagasError:
            return None
        assert isinstance(read, effects.Send)
        return read.target.kind, read.target.id

    def _message(self, node: ast.expr | None) -> str | None:
        """The type of the message that an expression makes."""
        match node:
            case ast.Name(id=name) if self._roles.get(name) == "event":
                return OWN_MESSAGE
            case ast.Attribute(value=ast.Name(id=name), attr="message") if self._roles.get(name) == "context":
                return OWN_MESSAGE
            case ast.Dict():
                return self._text(self._fields(node).get("type"))
            case ast.Call():
                made = self._value(node.func)
                if made is SagaMessage:
                    named = {one.arg: one.value for one in node.keywords}
                    return self._text(node.args[0] if node.args else named.get("type"))
                return _type_named_by(made)
            case None:
                return None
            case _:
                return _type_named_by(self._value(node))

    def _returned(self, value: ast.expr) -> None:
        """Notes what may be an effect and cannot be read: the answer of a function that is not known."""
        match value:
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                for part in parts:
                    self._returned(part)
            case ast.Starred(value=inner):
                self._returned(inner)
            case ast.IfExp(body=first, orelse=second):
                self._returned(first)
                self._returned(second)
            case ast.BinOp(left=first, right=second):
                self._returned(first)
                self._returned(second)
            case ast.Call():
                self._returning.add(id(value))
                called = self._value(value.func)
                is_read = isinstance(called, types.FunctionType) and (
                    called in _HELPERS
                    or called.__module__.partition(".")[0] == self._function.__module__.partition(".")[0]
                )
                if not is_read and not any(called is one for one in _HARMLESS):
                    self._blind(value, f"it returns what {ast.unparse(value.func)}(...) gives", "effects")
            case _:
                pass

    # -- statuses

    def _assignment(self, found: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        if found.value is None:
            return
        targets = found.targets if isinstance(found, ast.Assign) else [found.target]
        for target in targets:
            if self._is_state(target):
                if isinstance(found, ast.AugAssign):
                    self._state(found.value, keeps=True)
                else:
                    self._state(found.value)
            elif (
                isinstance(target, ast.Attribute) and self._is_state(target.value) and target.attr == self._status_field
            ):
                self._status(found.value)
            elif isinstance(target, ast.Subscript) and self._is_state(target.value):
                name = self._value(target.slice)
                if name == self._status_field:
                    self._status(found.value)
                elif not isinstance(name, str):
                    self._blind(target, "which field of the state it sets is computed", "status")

    def _is_state(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "state"
            and isinstance(node.value, ast.Name)
            and self._roles.get(node.value.id) == "saga"
        )

    def _state(self, node: ast.expr, *, keeps: bool = False) -> None:
        """What a new state says of the status. `keeps`: what it does not name stays as it was."""
        match node:
            case ast.IfExp(body=first, orelse=second):
                self._state(first, keeps=keeps)
                self._state(second, keeps=keeps)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right) if self._is_state(left):
                self._state(right, keeps=True)
            case ast.Dict():
                fields = self._fields(node)
                if self._status_field in fields:
                    self._status(fields[self._status_field])
                elif not keeps and not any(
                    key is None and self._is_state(value) for key, value in zip(node.keys, node.values, strict=True)
                ):
                    self._blind(node, "it sets a whole state that says nothing of a status", "status")
            case ast.Call():
                self._made_state(node, keeps=keeps)
            case _ if self._is_state(node):
                pass
            case _:
                self._blind(node, "it sets a state whose status is computed", "status")

    def _made_state(self, call: ast.Call, *, keeps: bool) -> None:
        named = {one.arg: one.value for one in call.keywords}
        if self._status_field in named:
            self._status(named[self._status_field])
            return
        if call.args and self._is_state(call.args[0]) and None not in named:
            return  # replace(saga.state, other=...)
        if isinstance(call.func, ast.Attribute) and self._is_state(call.func.value):
            update = named.get("update")
            if isinstance(update, ast.Dict):
                self._state(update, keeps=True)
                return
        made = self._value(call.func)
        if isinstance(made, type) and None not in named and not any(isinstance(one, ast.Starred) for one in call.args):
            try:
                parameters = list(inspect.signature(made).parameters.values())
            except (TypeError, ValueError):
                parameters = []
            names = [parameter.name for parameter in parameters]
            if parameters and self._status_field not in names:
                return  # A state without a status sets none.
            number = names.index(self._status_field) if parameters else -1
            if 0 <= number < len(call.args):
                self._status(call.args[number])
                return
            if parameters and isinstance(parameters[number].default, str):
                self._reader.statuses.append(ForeseenStatus(parameters[number].default, self._place(call)))
                return
        if not keeps:
            self._blind(call, "it sets a state whose status is computed", "status")

    def _status(self, node: ast.expr) -> None:
        if isinstance(node, ast.IfExp):
            self._status(node.body)
            self._status(node.orelse)
            return
        value = self._value(node)
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, str):
            self._reader.statuses.append(ForeseenStatus(value, self._place(node)))
        else:
            self._blind(node, "the status that it sets is computed", "status")

    # -- names

    def _value(self, node: ast.expr | None) -> object:
        """What an expression stands for, when that can be told without running anything of the user's."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name in self._locals:
                    return self._value(self._locals[name])
                if name in self._hidden or name in self._roles:
                    return _UNKNOWN
                return _named(self._function, name)
            case ast.Attribute(value=inner, attr=attribute):
                holder = self._value(inner)
                if isinstance(holder, (types.ModuleType, type)) or (
                    isinstance(holder, enum.Enum) and attribute in ("name", "value")
                ):
                    return getattr(holder, attribute, _UNKNOWN)
                return _UNKNOWN
            case _:
                return _UNKNOWN

    def _text(self, node: ast.expr | None) -> str | None:
        value = self._value(node)
        return value if isinstance(value, str) else None

    def _fields(self, node: ast.Dict) -> dict[str, ast.expr]:
        return {
            key.value: value
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }

    def _place(self, node: ast.AST) -> Place:
        return Place(self._file, getattr(node, "lineno", self._function.__code__.co_firstlineno))

    def _blind(self, node: ast.AST, why: str, hides: Literal["effects", "status"]) -> None:
        self._reader.blind_spots.append(BlindSpot(self._place(node), why, hides))


def _all_blind(place: Place, why: str) -> tuple[BlindSpot, BlindSpot]:
    return BlindSpot(place, why, "effects"), BlindSpot(place, why, "status")


def _type_named_by(value: object) -> str | None:
    """The wire type of a message class, or of a message that is there already."""
    if isinstance(value, SagaMessage):
        return str(value.type)
    if isinstance(value, dict):
        named = cast("dict[str, object]", value).get("type")
        return named if isinstance(named, str) else None
    cls = value if isinstance(value, type) else type(value)
    if is_declared_class(cls):
        try:
            return message_type_of(cls)
        except SagasError:
            return None
    return None


# --- Finding the source ----------------------------------------------------------------------------------------------


def _plain(function: object) -> _Function | None:
    """The Python function behind what was registered."""
    while isinstance(function, functools.partial):
        function = cast("functools.partial[object]", function).func
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType) and callable(function):
        called = inspect.getattr_static(type(function), "__call__", None)
        function = called if isinstance(called, types.FunctionType) else function
    return function if isinstance(function, types.FunctionType) else None


def _node_of(function: _Function) -> _Node | None:
    code = function.__code__
    tree = _tree_of(code.co_filename)
    if tree is None:
        return None
    if code.co_name == "<lambda>":
        return _lambda_at(tree, code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    return None


def _lambda_at(tree: ast.AST, code: types.CodeType) -> ast.Lambda | None:
    """The lambda that a code object is of: several may stand on one line, and the positions tell them apart."""
    candidates = [
        node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno
    ]
    if len(candidates) == 1:
        return candidates[0]
    places = {(line, column) for line, _, column, _ in code.co_positions() if line is not None and column is not None}

    def inside(node: ast.Lambda) -> int:
        body = node.body
        begin, end = (body.lineno, body.col_offset), (body.end_lineno or 0, body.end_col_offset or 0)
        return sum(begin <= place < end for place in places)

    found = max(candidates, key=inside, default=None)
    return found if found is not None and inside(found) else None


@functools.lru_cache(maxsize=256)
def _tree_of(file: str) -> ast.AST | None:
    source = "" if file.startswith("<") else "".join(linecache.getlines(file))
    if not source:
        return None
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def _named(function: _Function, name: str) -> object:
    """What a name stands for in a function: in its closure, its module, or the language."""
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if variable == name:
            try:
                return cell.cell_contents
            except ValueError:
                return _UNKNOWN
    if name in function.__globals__:
        return function.__globals__[name]
    builtins: object = function.__globals__.get("__builtins__", {})
    known = vars(builtins) if isinstance(builtins, types.ModuleType) else cast("dict[str, object]", builtins)
    return known.get(name, _UNKNOWN)


def _bound_in(node: _Node) -> set[str]:
    """The names that are bound inside a function, its parameters among them."""
    arguments = node.args
    names = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {one.arg for one in (arguments.vararg, arguments.kwarg) if one is not None}
    for found in _inside(node):
        if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store):
            names.add(found.id)
        elif isinstance(found, (ast.FunctionDef, ast.ClassDef, ast.MatchAs, ast.MatchStar)) and found.name is not None:
            names.add(found.name)
    return names


def _assigned_once(node: _Node) -> dict[str, ast.expr]:
    """Local names that are given a value in one place only, with that value."""
    values: dict[str, list[ast.expr | None]] = {}
    for found in _inside(node):
        if isinstance(found, ast.Assign) and len(found.targets) == 1 and isinstance(found.targets[0], ast.Name):
            values.setdefault(found.targets[0].id, []).append(found.value)
        elif isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store):
            values.setdefault(found.id, []).append(None)
    # A plain assignment was counted twice: as itself, and as the name that it stores.
    once = {name: found for name, found in values.items() if len(found) == 2 and None in found}
    return {name: value for name, found in once.items() for value in found if value is not None}


def _inside(node: _Node) -> Iterator[ast.AST]:
    for statement in [node.body] if isinstance(node, ast.Lambda) else node.body:
        yield from ast.walk(statement)
