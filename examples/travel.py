"""A trip of three reservations, which are taken back in the reverse order when one of them fails: and a point of no
return, behind which nothing is taken back any more.

`python -m examples.travel` tells of three trips: one comes about, one finds no car and gives up the hotel and the
flight, and one is called off when its tickets are issued: only what came after the tickets is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import (
    ALL_STEPS,
    CascadedMessage,
    Saga,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_complete,
    send,
)
from sagaloom.targets import EffectRequest

Effects = Sequence[CascadedMessage]


@dataclass(frozen=True)
class Trip:
    status: str = "new"
    booked: tuple[str, ...] = ()


@dataclass(frozen=True)
class TripPlanned:
    trip: str


@dataclass(frozen=True)
class FlightReserved:
    trip: str


@dataclass(frozen=True)
class HotelReserved:
    trip: str


@dataclass(frozen=True)
class CarReserved:
    trip: str


@dataclass(frozen=True)
class TicketsIssued:
    trip: str


@dataclass(frozen=True)
class LoungeBooked:
    trip: str


@dataclass(frozen=True)
class NothingFree:
    trip: str
    what: str


@dataclass(frozen=True)
class CalledOff:
    trip: str


Context = SagaContext[Trip]


def booked(trip: Trip, what: str) -> Trip:
    return replace(trip, status=f"{what} booked", booked=(*trip.booked, what))


def given_back(trip: Trip, what: str) -> Trip:
    return replace(trip, booked=tuple(one for one in trip.booked if one != what))


def planned(saga: Saga[Trip], event: SagaMessage[TripPlanned], context: Context) -> Effects:
    saga.state = Trip("planned")
    return [send("service:travel", {"reserve": "flight", "trip": event.payload.trip})]


def flight_reserved(saga: Saga[Trip], event: SagaMessage[FlightReserved], context: Context) -> Effects:
    saga.state = booked(saga.state, "flight")
    return [send("service:travel", {"reserve": "hotel", "trip": event.payload.trip})]


def cancel_flight(saga: Saga[Trip], event: SagaMessage[FlightReserved], context: Context) -> Effects:
    saga.state = given_back(saga.state, "flight")
    return [send("service:travel", {"cancel": "flight", "trip": event.payload.trip})]


def hotel_reserved(saga: Saga[Trip], event: SagaMessage[HotelReserved], context: Context) -> Effects:
    saga.state = booked(saga.state, "hotel")
    return [send("service:travel", {"reserve": "car", "trip": event.payload.trip})]


def cancel_hotel(saga: Saga[Trip], event: SagaMessage[HotelReserved], context: Context) -> Effects:
    saga.state = given_back(saga.state, "hotel")
    return [send("service:travel", {"cancel": "hotel", "trip": event.payload.trip})]


def car_reserved(saga: Saga[Trip], event: SagaMessage[CarReserved], context: Context) -> Effects:
    saga.state = booked(saga.state, "car")
    return [send("service:travel", {"issue": "tickets", "trip": event.payload.trip})]


def cancel_car(saga: Saga[Trip], event: SagaMessage[CarReserved], context: Context) -> Effects:
    saga.state = given_back(saga.state, "car")
    return [send("service:travel", {"cancel": "car", "trip": event.payload.trip})]


def tickets_issued(saga: Saga[Trip], event: SagaMessage[TicketsIssued], context: Context) -> Effects:
    saga.state = replace(saga.state, status="ticketed")
    return [send("service:travel", {"book": "lounge", "trip": event.payload.trip})]


def lounge_booked(saga: Saga[Trip], event: SagaMessage[LoungeBooked], context: Context) -> Effects:
    saga.state = booked(saga.state, "lounge")
    if event.payload.trip == "rome":
        return [saga_complete({"booked": saga.state.booked})]
    return []


def cancel_lounge(saga: Saga[Trip], event: SagaMessage[LoungeBooked], context: Context) -> Effects:
    saga.state = given_back(saga.state, "lounge")
    return [send("service:travel", {"cancel": "lounge", "trip": event.payload.trip})]


def nothing_free(saga: Saga[Trip], event: SagaMessage[NothingFree], context: Context) -> Effects:
    saga.state = replace(saga.state, status="given up")
    return [saga_compensate(ALL_STEPS, f"no {event.payload.what} is free")]


def called_off(saga: Saga[Trip], event: SagaMessage[CalledOff], context: Context) -> Effects:
    saga.state = replace(saga.state, status="called off")
    return [saga_compensate(ALL_STEPS, "called off")]


def trip_of(
    message: SagaMessage[
        TripPlanned
        | FlightReserved
        | HotelReserved
        | CarReserved
        | TicketsIssued
        | LoungeBooked
        | NothingFree
        | CalledOff
    ],
) -> str:
    return message.payload.trip


trips = (
    define_saga("trips")
    .state(Trip())
    .correlate(trip_of)
    .on(TripPlanned, planned, pivot=True)  # to look for a flight has to be undone by nobody
    .on(FlightReserved, flight_reserved, starts=False)
    .compensate(FlightReserved, cancel_flight)
    .on(HotelReserved, hotel_reserved, starts=False)
    .compensate(HotelReserved, cancel_hotel)
    .on(CarReserved, car_reserved, starts=False)
    .compensate(CarReserved, cancel_car)
    .on(TicketsIssued, tickets_issued, starts=False, pivot=True)
    .on(LoungeBooked, lounge_booked, starts=False)
    .compensate(LoungeBooked, cancel_lounge)
    .on(NothingFree, nothing_free, starts=False)
    .on(CalledOff, called_off, starts=False)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


def answer(request: EffectRequest) -> object:
    """Everything is free, but a car in Oslo."""
    match request.payload:
        case {"reserve": "flight", "trip": trip}:
            return FlightReserved(trip)
        case {"reserve": "hotel", "trip": trip}:
            return HotelReserved(trip)
        case {"reserve": "car", "trip": "oslo"}:
            return NothingFree("oslo", "car")
        case {"reserve": "car", "trip": trip}:
            return CarReserved(trip)
        case {"issue": "tickets", "trip": trip}:
            return TicketsIssued(trip)
        case {"book": "lounge", "trip": trip}:
            return LoungeBooked(trip)
        case _:
            return None


async def a_trip_that_comes_about(teller: Teller) -> None:
    await teller.publish(TripPlanned("rome"))


async def a_trip_without_a_car(teller: Teller) -> None:
    await teller.publish(TripPlanned("oslo"))


async def a_trip_that_is_called_off_late(teller: Teller) -> None:
    await teller.publish(TripPlanned("bern"))
    await teller.publish(CalledOff("bern"))


def holds(ending: Ending) -> bool:
    rome, oslo, bern = (ending.instances[f"trips:{trip}"] for trip in ("rome", "oslo", "bern"))
    cancelled = [asked for asked in ending.outside if "cancel" in asked]
    return (
        rome["status"] == "completed"
        and (oslo["status"], oslo["reason"], oslo["state"]["booked"]) == ("failed", "no car is free", [])
        and (bern["status"], bern["reason"], bern["state"]["booked"])
        == ("failed", "called off", ["flight", "hotel", "car"])
        and cancelled
        == [
            f'service:travel {{"cancel": "{what}", "trip": "{trip}"}}'
            for what, trip in (("flight", "oslo"), ("hotel", "oslo"), ("lounge", "bern"))
        ]
    )


story = Story(
    name="travel",
    acts=[
        Act(sagas=[trips], steps=[a_trip_that_comes_about, a_trip_without_a_car, a_trip_that_is_called_off_late]),
    ],
    answer=answer,
    holds=holds,
)

if __name__ == "__main__":
    tell_as_script(story)
