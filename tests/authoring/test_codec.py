"""What is written comes back, or is refused at the call with the place, the value and the way out."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, NotRequired, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st

from sagaloom import DecodeError, DefinitionError, EncodeError
from sagaloom.codec import UNTYPED, codec_for, encode_any, encode_any_and_read, is_declared_class

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass(frozen=True)
class Line:
    price: Decimal
    at: datetime | None = None


@dataclass
class Order:
    id: UUID
    lines: list[Line] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    color: Color = Color.RED
    weight: float = 1.0
    extra: Any = None


class OrderDict(TypedDict):
    status: str
    placed_at: NotRequired[datetime]


class OrderExtended(typing_extensions.TypedDict):
    status: str


class OrderStruct(msgspec.Struct):
    id: int
    name: str = "n"


@attrs.define
class OrderAttrs:
    id: int
    day: date


class OrderModel(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")
    at: datetime | None = None
    weight: float = 1.0


@pydantic.dataclasses.dataclass
class OrderPydantic:
    id: int


@dataclass
class Mixed:
    model: OrderModel


class NoEquality:
    pass


class Blind(msgspec.Struct, eq=False):
    id: int
    inner: list[int]


ID = UUID(int=7)
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


@given(JSON)
def test_every_json_value_comes_back_equal(value: object) -> None:
    codec = codec_for(None)

    assert codec.decode(codec.encode(value)) == value


@given(st.recursive(st.integers() | st.text("ab"), lambda inner: st.lists(inner).map(tuple), max_leaves=8))
def test_tuples_in_untyped_data_come_back_as_lists(value: object) -> None:
    def listed(part: object) -> object:
        return [listed(one) for one in part] if isinstance(part, tuple) else part

    codec = codec_for(dict)

    assert codec.decode(codec.encode(value)) == listed(value)


@given(st.builds(Order, id=st.uuids(), lines=st.lists(st.builds(Line, price=st.decimals(allow_nan=False)))))
def test_every_dataclass_value_comes_back_equal(order: Order) -> None:
    codec = codec_for(Order)

    assert codec.decode(codec.encode(order)) == order


@pytest.mark.parametrize(
    ("value", "path", "way_out"),
    [
        ({"at": AT}, "$.at", "isoformat"),
        ({"day": AT.date()}, "$.day", "isoformat"),
        ({"for": timedelta(1)}, "$.for", "total_seconds"),
        ({"ids": [1, ID]}, "$.ids[1]", "str(value)"),
        ({"price": Decimal("1.5")}, "$.price", "str(value)"),
        ({"raw": b"x"}, "$.raw", "base64"),
        ({"tags": {"a"}}, "$.tags", "sorted"),
        ({"a": {1: "x"}}, "$.a[1]", "str(key)"),
        ({"a": {1: "x", "1": "y"}}, "$.a[1]", "str(key)"),
        ({"x": math.nan}, "$.x", "NaN"),
        ({"x": [math.inf]}, "$.x[0]", "infinity"),
        ({"line": Line(Decimal(1))}, "$.line", "a field of type Line"),
        ({"color": Color.RED}, "$.color", "value.value"),
        ({"what": NoEquality()}, "$.what", "JSON values"),
        ({"a b": {"c": {2}}}, "$['a b'].c", "sorted"),
        ({"t": "\ud800"}, "$.t", "surrogate"),
        ({"\ud800": 1}, "$['\\ud800']", "surrogate"),
        ({"m": type("M", (str,), {})("x")}, "$.m", "str(value)"),
    ],
)
def test_an_untyped_value_that_would_change_is_refused_with_place_and_way_out(
    value: object, path: str, way_out: str
) -> None:
    with pytest.raises(EncodeError) as caught:
        codec_for(None).encode(value)

    assert path == caught.value.data["path"]
    assert f"untyped JSON at {path}: " in caught.value.message
    assert way_out in caught.value.message
    assert caught.value.retryable is False
    assert caught.value.code == "STATE_NOT_ENCODABLE"


def test_an_untyped_enum_that_equals_its_json_is_allowed() -> None:
    assert codec_for(None).encode({"level": Level.HIGH}) == b'{"level":3}'


def test_nul_in_a_string_comes_back() -> None:
    codec = codec_for(None)

    assert codec.decode(codec.encode({"a\0": "b\0"})) == {"a\0": "b\0"}


@pytest.mark.parametrize("codec", [codec_for(None), codec_for(Order)])
def test_a_value_that_contains_itself_is_refused(codec: Any) -> None:
    endless: list[object] = []
    endless.append(endless)

    with pytest.raises(EncodeError, match="contains itself"):
        codec.encode(endless if codec is codec_for(None) else Order(ID, extra=endless))


def test_json_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(DecodeError, match="nested too deep"):
        codec_for(None).decode(b"[" * 100_000)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (OrderDict, {"status": "new", "placed_at": AT}),
        (OrderDict, {"status": "new"}),
        (OrderExtended, {"status": "new"}),
        (OrderStruct, OrderStruct(1)),
        (OrderAttrs, OrderAttrs(1, date(2026, 1, 31))),
        (OrderModel, OrderModel(orderId=1, at=AT)),
        (OrderPydantic, OrderPydantic(1)),
        (Mixed, Mixed(OrderModel(orderId=1))),
        (list[OrderModel], [OrderModel(orderId=1)]),
        (dict[int, str], {1: "x"}),
        (list[int], [1, 2]),
        (int | None, None),
        (Annotated[int, msgspec.Meta(ge=1)], 3),
        (datetime, AT),
    ],
)
def test_a_declared_value_comes_back_equal(declared: Any, value: object) -> None:
    codec = codec_for(declared)

    assert codec.decode(codec.encode(value)) == value


def test_a_class_without_equality_is_compared_by_its_fields() -> None:
    codec = codec_for(Blind)

    assert codec.decode(codec.encode(Blind(1, [2]))).inner == [2]


@pytest.mark.parametrize(
    ("declared", "value", "path"),
    [
        (Order, Order(ID, weight=math.nan), "$.weight"),
        (Order, Order(ID, extra={"at": AT}), "$.extra.at"),
        (Order, Order(ID, tags=(1,)), "$.tags[0]"),  # type: ignore[arg-type]
        (Order, Order(ID, extra=NoEquality()), "$.extra"),
        (Order, Order(ID, extra=["\ud800"]), "$.extra[0]"),
        (Order, Order("x"), "$.id"),  # type: ignore[arg-type]
        (Order, {"id": str(ID)}, "$"),
        (OrderDict, {"status": "new", "more": 1}, "$.more"),
        (OrderDict, {"status": 1}, "$.status"),
        (OrderStruct, OrderStruct(1, name=None), "$.name"),  # type: ignore[arg-type]
        (OrderModel, OrderModel(orderId=1, weight=math.nan), "$.weight"),
        (OrderModel, OrderModel.model_construct(order_id="x"), "$.orderId"),
        (OrderModel, OrderModel.model_construct(order_id="1"), "$.order_id"),
    ],
)
def test_a_value_that_does_not_fit_its_declaration_is_refused(declared: Any, value: object, path: str) -> None:
    with pytest.raises(EncodeError) as caught:
        codec_for(declared).encode(value)

    assert (declared.__name__, path) == (caught.value.data["type"], caught.value.data["path"])


@pytest.mark.parametrize(
    ("declared", "data", "path", "expected"),
    [
        (Order, b'{"id": 1}', "$.id", "uuid"),
        (Order, b"{}", "$", "`id`"),
        (Order, b"3", "$", "object"),
        (Order, b"", "$", "truncated"),
        (OrderStruct, b'{"id":1,"name":"' + b"\xff" + b'"}', "$", "utf-8"),
        (Order, b'{"id": "00000000-0000-0000-0000-000000000007", "lines": [{"price": []}]}', "$.lines[0].price", ""),
        (OrderDict, b'{"status": 3}', "$.status", "`str`"),
        (OrderModel, b'{"orderId": "x"}', "$.orderId", "integer"),
        (OrderModel, b"{}", "$.orderId", "required"),
        (OrderModel, b'{"orderId": 1, "weight": NaN}', "$", "malformed"),
        (None, b'{"a": NaN}', "$", "malformed"),
        (None, b'"\\ud800"', "$", ""),
        (None, b'{"a":1}x', "$", "malformed"),
    ],
)
def test_json_that_is_no_such_value_is_refused_with_its_place(
    declared: Any, data: bytes, path: str, expected: str
) -> None:
    with pytest.raises(DecodeError) as caught:
        codec_for(declared).decode(data)

    assert path == caught.value.data["path"]
    assert expected.lower() in caught.value.message.lower()
    assert (caught.value.code, caught.value.retryable) == ("VALIDATION_ERROR", False)


@given(st.binary())
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for declared in (None, Order, OrderModel, OrderDict):
        with contextlib.suppress(DecodeError):
            codec_for(declared).decode(data)


def test_unknown_fields_of_a_payload_are_ignored() -> None:
    assert codec_for(OrderStruct).decode(b'{"id":1,"newer":2}') == OrderStruct(1)


@pytest.mark.parametrize("declared", [Order, OrderDict, OrderExtended, OrderStruct, OrderAttrs, OrderModel])
def test_every_way_to_declare_fields_is_known(declared: type) -> None:
    assert is_declared_class(declared)


@pytest.mark.parametrize("declared", [dict, str, NoEquality, None, list[int], Order(ID)])
def test_what_declares_no_fields_is_not(declared: object) -> None:
    assert not is_declared_class(declared)


def test_one_declaration_has_one_codec() -> None:
    assert codec_for(Order) is codec_for(Order)


@pytest.mark.parametrize("declared", [None, dict, Mapping, dict[str, Any], Mapping[str, Any], Any, object])
def test_plain_data_is_untyped_json(declared: Any) -> None:
    assert codec_for(declared).name == "untyped JSON"


@dataclass
class HasNoJson:
    what: NoEquality


def test_a_type_that_cannot_be_read_back_is_refused_when_it_is_declared() -> None:
    with pytest.raises(DefinitionError, match=r"HasNoJson cannot be turned into JSON and back: .*NoEquality"):
        codec_for(HasNoJson)


def test_schemas_name_the_fields() -> None:
    assert codec_for(None).json_schema() == {}
    assert list(codec_for(Order).json_schema()["$defs"]["Order"]["properties"]) == [
        *("id", "lines", "tags", "color", "weight", "extra")
    ]
    assert list(codec_for(OrderModel).json_schema()["properties"]) == ["orderId", "at", "weight"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, b"null"),
        ("text", b'"text"'),
        ({"a": (1, 2)}, b'{"a":[1,2]}'),
        (OrderStruct(1), b'{"id":1,"name":"n"}'),
        ([OrderStruct(1)], b'[{"id":1,"name":"n"}]'),
        ({"model": OrderModel(orderId=1)}, b'{"model":{"orderId":1,"at":null,"weight":1.0}}'),
    ],
)
def test_an_undeclared_value_may_hold_instances_of_declarable_classes(value: object, expected: bytes) -> None:
    assert encode_any(value) == expected


@pytest.mark.parametrize("value", [None, True, 1.5, 2**70, {"a": (1, 2)}, [OrderStruct(1)], {"level": Level.HIGH}])
def test_what_was_read_of_an_undeclared_value_is_what_would_be_decoded(value: object) -> None:
    data, read = encode_any_and_read(value)

    assert data == encode_any(value)
    assert repr(read) == repr(UNTYPED.decode(data))


def test_nothing_that_was_read_belongs_to_the_value() -> None:
    lines: list[object] = [{"sku": "paper"}]

    _, read = encode_any_and_read({"lines": lines})

    assert read == {"lines": lines}
    assert read["lines"] is not lines
    assert read["lines"][0] is not lines[0]


def test_an_instance_of_a_class_was_not_read_as_untyped_json() -> None:
    assert encode_any_and_read(OrderStruct(1)) == (b'{"id":1,"name":"n"}', msgspec.UNSET)


@pytest.mark.parametrize("value", [AT, {"at": AT}, {1: 2}, math.nan, NoEquality, OrderStruct("x"), ["\ud800"]])  # type: ignore[arg-type]
def test_an_undeclared_value_that_is_no_json_is_a_validation_error(value: object) -> None:
    with pytest.raises(EncodeError) as caught:
        encode_any(value)

    assert caught.value.code == "VALIDATION_ERROR"
