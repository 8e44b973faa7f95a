"""BFCL's AST rules: do the decoded calls answer the question?

A question has function descriptions and, for each expected call, the accepted values of every parameter; an accepted
value "" means that the parameter may be left out. The rules and the error types are those of the published checker
(gorilla, `ast_checker`), item by item. A value whose accepted values have another type than the declared one is a
*variable*, compared as it stands. The checks return None where all is right, else a `Fault`.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hymba_tune.evaluation import bfcl_java, bfcl_javascript
from hymba_tune.evaluation.bfcl_decode import Call

PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
TYPES = {"Python": PYTHON_TYPES, "Java": bfcl_java.TYPES, "JavaScript": bfcl_javascript.TYPES}
"""What a declared type is in Python, by the language of the answers."""
LISTS = {"Python": ("array", "tuple"), "Java": ("Array", "ArrayList"), "JavaScript": ("array",)}
"""The types whose elements have a declared type too."""
_CONVERT = {"Java": bfcl_java.convert, "JavaScript": bfcl_javascript.convert}
_NOT_SOURCE = {"Java": "type_error:java", "JavaScript": "type_error:js"}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_SHOWN_CHARS = 200


class Fault(NamedTuple):
    """Why calls are wrong: the official error type, and a sentence."""

    error_type: str
    why: str


Accepted = Sequence[Any]
"""The accepted values of one parameter."""
Expected = dict[str, dict[str, Accepted]]
"""One expected call: `{function name: {parameter: accepted values}}`."""


def check(
    calls: Sequence[Call],
    functions: Sequence[dict[str, Any]],
    expected: Sequence[Expected],
    category: str,
    language: str = "Python",
) -> Fault | None:
    """The fault of the calls, or None.

    Args:
        functions: the question's function descriptions.
        expected: the expected calls.
        category: decides the rule: `parallel` in its name, in any order; `multiple`, one of several functions; else
            the one function.
    """
    rule = next((rule for rule in ("parallel", "multiple") if rule in category), "simple")
    if len(calls) != len(expected):
        checker = {"parallel": "parallel_function_checker_no_order"}.get(rule, f"{rule}_function_checker")
        return Fault(f"{checker}:wrong_count", f"{len(calls)} calls where {len(expected)} are expected")
    if rule == "parallel":
        return check_in_any_order(calls, functions, expected, language)
    function = functions[0] if rule == "simple" else _described(functions, expected[0])
    return check_call(calls[0], function, expected[0], language)


def _described(functions: Sequence[dict[str, Any]], expected: Expected) -> dict[str, Any] | None:
    return next((function for function in functions if function["name"] in expected), None)


def check_in_any_order(
    calls: Sequence[Call], functions: Sequence[dict[str, Any]], expected: Sequence[Expected], language: str
) -> Fault | None:
    """Each expected call takes the first call left that answers it."""
    left = list(calls)
    for number, wanted in enumerate(expected):
        faults = []
        for position, call in enumerate(left):
            fault = check_call(call, _described(functions, wanted), wanted, language)
            if fault is None:
                del left[position]
                break
            faults.append(fault.why)
        else:
            why = f"no call answers expected call {number}: {'; '.join(faults)}"
            return Fault("parallel_function_checker_no_order:cannot_find_match", why)
    return None


def check_call(call: Call, function: dict[str, Any] | None, expected: Expected, language: str) -> Fault | None:
    """The name, the required parameters, each argument in the answer's order, then the parameters left out."""
    if function is None:  # parallel_multiple_179 expects a function it does not describe; nothing can be right
        return Fault("simple_function_checker:wrong_func_name", f"the item describes no function {show([*expected])}")
    if call.name != function["name"]:
        return Fault("simple_function_checker:wrong_func_name", f"{show(call.name)} is not {function['name']}")
    (accepted,) = expected.values()
    properties = function["parameters"]["properties"]
    for parameter in function["parameters"].get("required", ()):
        if parameter not in call.arguments:
            return Fault("simple_function_checker:missing_required", f"{parameter} is required")
    for parameter, value in call.arguments.items():
        if parameter not in properties or parameter not in accepted:
            return Fault("simple_function_checker:unexpected_param", f"no parameter {show(parameter)}")
        fault = check_argument(value, accepted[parameter], properties[parameter], language)
        if fault:
            return Fault(fault.error_type, f"{parameter}: {fault.why}")
    for parameter, values in accepted.items():
        if parameter not in call.arguments and "" not in values:
            return Fault("simple_function_checker:missing_optional", f"{parameter} may not be left out here")
    return None


def check_argument(value: Any, accepted: Accepted, schema: dict[str, Any], language: str) -> Fault | None:
    """A Python value is checked as it is; Java and JavaScript source text is converted by the declared type first."""
    kind = schema["type"]
    element = schema["items"]["type"] if kind in LISTS[language] else None
    if language == "Python":
        value = _python_value(value, kind)
    elif isinstance(value, str):
        value = _CONVERT[language](value, kind, element)
    else:
        return Fault(_NOT_SOURCE[language], f"{show(value)} is not source text")
    types = TYPES[language]
    return check_typed(value, accepted, types[kind], types[element] if element else None)


def _python_value(value: Any, kind: str) -> Any:
    """A tuple counts as a list where a tuple is declared, an integer as a float where a float is."""
    if kind == "tuple" and isinstance(value, tuple):
        return list(value)
    if kind == "float" and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return value
    return value


def check_typed(value: Any, accepted: Accepted, expected: type, element: type | None) -> Fault | None:
    """Type, then value. `element` is the type of a list's elements."""
    is_variable, fault = check_type(value, accepted, expected, element)
    if fault:
        return fault
    if not is_variable:
        if expected is dict:
            return check_dict(value, accepted)
        if expected is list:
            return check_list_of_dicts(value, accepted) if element is dict else check_list(value, accepted)
        if expected is str:
            return check_string(value, accepted)
    return None if value in accepted else Fault("value_error:others", f"{show(value)} is not among {show(accepted)}")


def check_type(value: Any, accepted: Accepted, expected: type, element: type | None) -> tuple[bool, Fault | None]:
    """(the value is a variable, the fault). The type of an accepted value is taken for right, whatever is declared."""
    accepted_type = next((type(answer) for answer in accepted if answer != ""), None)
    if type(value) is expected:
        is_variable = accepted_type not in (None, expected)
        if element is None or any(_elements_fit(value, answer, element) for answer in accepted):
            return is_variable, None
        if type(value) is accepted_type:
            return True, Fault("type_error:nested", f"an element of {show(value)} is no {element.__name__}")
    elif accepted_type is not None and type(value) is accepted_type:
        return True, None
    return False, Fault("type_error:simple", f"{show(value)} is no {expected.__name__}")


def _elements_fit(value: Any, answer: Any, element: type) -> bool:
    return not isinstance(answer, list) or all(check_type(item, answer, element, None)[1] is None for item in value)


def standard(value: Any) -> Any:
    """A string without blanks, case and the punctuation ` ,./-_*^`, with double quotes; any other value as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def check_string(value: str, accepted: Accepted) -> Fault | None:
    if standard(value) in [standard(answer) for answer in accepted if isinstance(answer, str)]:
        return None
    return Fault("value_error:string", f"{show(value)} is not among {show(accepted)}")


def check_list(value: list[Any], accepted: Accepted) -> Fault | None:
    if [standard(item) for item in value] in [[standard(item) for item in answer] for answer in accepted]:
        return None
    return Fault("value_error:list/tuple", f"{show(value)} is not among {show(accepted)}")


def check_dict(value: dict[Any, Any], accepted: Accepted) -> Fault | None:
    """Each accepted value is a dict of accepted values; the fault told is the one against the last of them."""
    fault: Fault | None = Fault("dict_checker:unclear", "no accepted value")
    for answer in accepted:
        if answer == "":
            continue
        fault = _dict_fault(value, answer)
        if fault is None:
            return None
    return fault


def _dict_fault(value: Any, answer: dict[str, Accepted]) -> Fault | None:
    if not isinstance(value, dict):
        return Fault("type_error:nested", f"{show(value)} is no dict")
    fault = None
    for key, item in value.items():
        if key not in answer:
            fault = Fault("value_error:dict_key", f"no key {show(key)}")
            break
        if standard(item) not in [standard(choice) for choice in answer[key]]:
            fault = Fault("value_error:dict_value", f"{show(item)} under {show(key)} is not among {show(answer[key])}")
            break
    for key, choices in answer.items():  # a missing key is told even after another fault, as in the official checker
        if key not in value and "" not in choices:
            return Fault("value_error:dict_key", f"the key {show(key)} is missing")
    return fault


def check_list_of_dicts(value: list[Any], accepted: Accepted) -> Fault | None:
    """Dicts in the order of the accepted list."""
    fault: Fault | None = Fault("list_dict_checker:unclear", "no accepted value")
    for answer in accepted:
        if len(value) != len(answer):
            fault = Fault("value_error:list_dict_count", f"{len(value)} dicts where {len(answer)} are expected")
            continue
        faults = (check_dict(item, [wanted]) for item, wanted in zip(value, answer, strict=True))
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return None
    return fault


def show(value: Any) -> str:
    """A short form of any value for a sentence."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, a value nested too deep
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
