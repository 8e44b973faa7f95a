"""tiny_calls: requests to answer with function calls, in the manner of BFCL: one function or several to choose from,
one call or two, sometimes after an earlier exchange; training conversations also read results and report them.

Key: a call with its arguments, whatever the request's words and the other functions on offer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hymba_tune.data.synthetic.problem import Key, Message, Problem
from hymba_tune.data.synthetic.words import CITIES, COLORS, DAYS, DEVICES, FOODS, NAMES, ROOMS

SYSTEM_PROMPTS = ("Use the tools to help.", "You are an assistant with tools.")
SYSTEM_SHARE = 0.15
TWO_CALLS_SHARE = 0.2
EARLIER_TURN_SHARE = 0.15
RESULT_SHARE = 0.4
OFFERED = (1, 2, 3)
"""How many functions a conversation lists."""

Values = Callable[[random.Random], Any]


def _of(options: tuple[str, ...]) -> Values:
    return lambda rng: rng.choice(options)


def _between(low: int, high: int, step: int = 1) -> Values:
    return lambda rng: rng.randrange(low, high + 1, step)


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(6, 22):02}:{rng.choice((0, 10, 15, 20, 30, 40, 45, 50)):02}"


@dataclass(frozen=True, slots=True)
class Function:
    """A callable tool: parameters in order, requests for it, what it returns and how that is told.

    requests are lower-case clauses without a full stop, so that two can stand in one sentence.
    """

    name: str
    description: str
    parameters: dict[str, Values]
    requests: tuple[str, ...]
    result: dict[str, Values]
    report: str

    def schema(self) -> dict[str, Any]:
        example = draw_call(random.Random(0), self).arguments
        types = {name: "integer" if isinstance(value, int) else "string" for name, value in example.items()}
        return {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": {name: {"type": kind} for name, kind in types.items()},
                "required": list(types),
            },
        }


FUNCTIONS = (
    Function(
        "get_weather",
        "Weather of a city.",
        {"city": _of(CITIES), "day": _of(DAYS)},
        ("tell me the weather in {city} on {day}", "check the weather for {day} in {city}"),
        {"sky": _of(("sun", "rain", "snow", "wind")), "degrees": _between(1, 30)},
        "It will be {sky} and {degrees} degrees in {city}.",
    ),
    Function(
        "set_alarm",
        "Set an alarm.",
        {"time": _clock, "day": _of(DAYS)},
        ("wake me at {time} on {day}", "set an alarm for {day} at {time}"),
        {"alarms": _between(1, 9)},
        "The alarm is set for {time} on {day}.",
    ),
    Function(
        "set_timer",
        "Start a timer.",
        {"minutes": _between(2, 90), "label": _of(FOODS)},
        ("start a timer of {minutes} minutes for the {label}", "time the {label} for {minutes} minutes"),
        {"timers": _between(1, 9)},
        "The {label} timer runs for {minutes} minutes.",
    ),
    Function(
        "send_message",
        "Send a message to a person.",
        {"person": _of(NAMES), "text": _of(("I am late", "call me", "see you soon", "good luck", "thank you"))},
        ('send {person} the message "{text}"', 'write "{text}" to {person}'),
        {"sent": _clock},
        "The message to {person} was sent at {sent}.",
    ),
    Function(
        "order_food",
        "Order food.",
        {"dish": _of(FOODS), "count": _between(2, 20), "city": _of(CITIES)},
        ("order {count} plates of {dish} in {city}", "get me {dish} for {count} people in {city}"),
        {"dollars": _between(10, 99), "minutes": _between(10, 90, 5)},
        "The {dish} costs {dollars} dollars and comes in {minutes} minutes.",
    ),
    Function(
        "book_table",
        "Book a table.",
        {"people": _between(2, 12), "day": _of(DAYS), "time": _clock},
        ("book a table for {people} people on {day} at {time}", "reserve a table on {day} at {time} for {people}"),
        {"table": _between(1, 40)},
        "Table {table} is booked for {day} at {time}.",
    ),
    Function(
        "find_train",
        "Find a train between two cities.",
        {"start": _of(CITIES[:8]), "end": _of(CITIES[8:]), "day": _of(DAYS)},
        ("find a train from {start} to {end} on {day}", "how can I get to {end} from {start} by train on {day}"),
        {"leaves": _clock, "dollars": _between(10, 99)},
        "A train leaves {start} at {leaves} and costs {dollars} dollars.",
    ),
    Function(
        "switch_device",
        "Switch a device on or off.",
        {"device": _of(DEVICES), "room": _of(ROOMS), "state": _of(("on", "off"))},
        ("switch {state} the {device} in the {room}", "turn the {room} {device} {state}"),
        {"watts": _between(5, 95, 5)},
        "The {device} in the {room} is {state}.",
    ),
    Function(
        "set_heating",
        "Set the heating of a room.",
        {"room": _of(ROOMS), "degrees": _between(12, 28)},
        ("heat the {room} to {degrees} degrees", "make it {degrees} degrees in the {room}"),
        {"now": _between(5, 20)},
        "The {room} has {now} degrees and will get {degrees}.",
    ),
    Function(
        "set_light",
        "Set the color of a light.",
        {"room": _of(ROOMS), "color": _of(COLORS), "level": _between(5, 100, 5)},
        ("make the light in the {room} {color} at level {level}", "set a {color} light of level {level} in the {room}"),
        {"lights": _between(1, 6)},
        "The {room} light is {color} at level {level}.",
    ),
    Function(
        "add_event",
        "Add an event to the calendar.",
        {"person": _of(NAMES), "day": _of(DAYS), "time": _clock},
        ("plan to meet {person} on {day} at {time}", "put a meeting with {person} at {time} on {day} in my calendar"),
        {"events": _between(1, 9)},
        "You meet {person} on {day} at {time}.",
    ),
    Function(
        "convert_money",
        "Convert an amount of money.",
        {
            "amount": _between(2, 99),
            "source": _of(("dollars", "euros", "pounds")),
            "target": _of(("yen", "francs", "pesos")),
        },
        ("change {amount} {source} into {target}", "how many {target} are {amount} {source}"),
        {"value": _between(100, 999)},
        "{amount} {source} are {value} {target}.",
    ),
)
_OPENINGS = ("Please {}.", "Can you {}?", "I want you to {}.", "{}.", "{}, please.")


@dataclass(frozen=True, slots=True)
class Call:
    function: Function
    arguments: dict[str, Any]

    def key(self) -> Key:
        return ("calls", self.function.name, *self.arguments.items())

    def as_message_part(self) -> dict[str, Any]:
        return {"name": self.function.name, "arguments": self.arguments}

    def request(self, rng: random.Random) -> str:
        return rng.choice(self.function.requests).format(**self.arguments)


def draw(rng: random.Random) -> Problem:
    offered = rng.sample(FUNCTIONS, rng.choice(OFFERED))
    earlier_messages, earlier_calls = _earlier(rng, offered)
    calls = _draw_calls(rng, offered)
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < SYSTEM_SHARE else []
    return Problem(
        key=calls[0].key(),
        prompt=[*system, *earlier_messages, {"role": "user", "content": _request(rng, calls)}],
        reply=_calling(calls),
        target=[call.as_message_part() for call in calls],
        scorer="calls",
        rest=_results(rng, calls) if rng.random() < RESULT_SHARE else [],
        tools=[function.schema() for function in offered],
        other_keys=tuple(call.key() for call in (*calls[1:], *earlier_calls)),
    )


def _earlier(rng: random.Random, offered: list[Function]) -> tuple[list[Message], list[Call]]:
    """Now and then a finished exchange before the one that counts, and its call."""
    if rng.random() >= EARLIER_TURN_SHARE:
        return [], []
    calls = _draw_calls(rng, offered)[:1]
    return [{"role": "user", "content": _request(rng, calls)}, _calling(calls), *_results(rng, calls)], calls


def _draw_calls(rng: random.Random, offered: list[Function]) -> list[Call]:
    count = 2 if rng.random() < TWO_CALLS_SHARE else 1
    return [draw_call(rng, rng.choice(offered)) for _ in range(count)]


def draw_call(rng: random.Random, function: Function) -> Call:
    return Call(function, {name: values(rng) for name, values in function.parameters.items()})


def _request(rng: random.Random, calls: list[Call]) -> str:
    text = rng.choice(_OPENINGS).format(" and ".join(call.request(rng) for call in calls))
    return text[0].upper() + text[1:]


def _calling(calls: list[Call]) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [call.as_message_part() for call in calls]}


def _results(rng: random.Random, calls: list[Call]) -> list[Message]:
    """One tool message a call, and the assistant's report."""
    results = [{name: values(rng) for name, values in call.function.result.items()} for call in calls]
    reports = [
        call.function.report.format(**call.arguments, **result) for call, result in zip(calls, results, strict=True)
    ]
    tool_messages: list[Message] = [{"role": "tool", "content": json.dumps(result)} for result in results]
    return [*tool_messages, {"role": "assistant", "content": " ".join(reports)}]
