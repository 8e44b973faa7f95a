"""BFCL answers -> calls: the text form `[f(a=1), g(b=2)]`, the function-calling form, our chat template's tool calls.

The rules are those of the published handlers (gorilla): an answer is data, read by a parser and never run. An answer
that cannot be read raises `Undecodable` with the official error type; nothing else escapes, however hostile the text.
Limits: `MAX_ANSWER_CHARS`, `MAX_BITS`, those of bfcl_source.py, and CPython's own on brackets (200 deep) and digits
(4,300).
"""

import ast
import json
import operator
import warnings
from typing import Any, NamedTuple

from hymba_tune.evaluation import bfcl_java, bfcl_javascript

MAX_ANSWER_CHARS = 100_000  # the official harness generates at most 1,000 tokens
MAX_BITS = 4_096  # of a power inside an argument: `9**9**9` must not hang

FAILED = "ast_decoder:decoder_failed"
WRONG_FORMAT = "ast_decoder:decoder_wrong_output_format"

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Call(NamedTuple):
    """One decoded function call; arguments keep the order of the answer."""

    name: str
    arguments: dict[Any, Any]


class Undecodable(ValueError):
    """The answer holds no readable calls; `error_type` is the official string."""

    def __init__(self, why: str, error_type: str = FAILED) -> None:
        super().__init__(why)
        self.error_type = error_type


def decode(answer: Any, language: str = "Python") -> list[Call]:
    """The calls of an answer: text in `Python`, `Java` or `JavaScript`, or a list in function-calling form."""
    if not isinstance(answer, str):
        return _function_calling_form(answer)
    if len(answer) > MAX_ANSWER_CHARS:
        raise Undecodable(f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}")
    text = _bracketed(answer)
    try:
        if language == "Python":
            return _python_calls(text)
        parse = bfcl_java.parse_call if language == "Java" else bfcl_javascript.parse_call
        call = parse(text[1:-1])
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
        raise Undecodable(f"{type(error).__name__}: {error}") from error
    if call is None:
        raise Undecodable("no call in the answer", WRONG_FORMAT)
    return [Call(*call)]


def decode_tool_calls(answer: str) -> list[Call]:
    """The `<toolcall> {"name", "arguments"} </toolcall>` blocks of an answer given through our chat template."""
    if len(answer) > MAX_ANSWER_CHARS:
        raise Undecodable(f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}")
    calls = []
    for piece in answer.split("<toolcall>")[1:]:
        block, closed, _ = piece.partition("</toolcall>")
        if not closed:
            raise Undecodable("a <toolcall> without its end")
        call = _json(block)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise Undecodable("a tool call is not a JSON object with a name")
        calls.append(Call(call["name"], _arguments(call.get("arguments", {}))))
    if not calls:
        raise Undecodable("no <toolcall> block in the answer")
    return calls


def _bracketed(answer: str) -> str:
    text = answer.removeprefix(" ")
    text = text if text.startswith("[") else "[" + text
    return text if text.endswith("]") else text + "]"


def _function_calling_form(answer: Any) -> list[Call]:
    """`[{name: arguments}]`, the arguments a JSON string or an object."""
    if not isinstance(answer, list):
        raise Undecodable(f"neither text nor a list of calls: {type(answer).__name__}")
    calls = []
    for item in answer:
        if not isinstance(item, dict) or not item:
            raise Undecodable("an item of the list is not a call")
        name, arguments = next(iter(item.items()))
        calls.append(Call(name, _arguments(_json(arguments) if isinstance(arguments, str) else arguments)))
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"not JSON: {error}") from error


def _arguments(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Undecodable("the arguments are not an object", WRONG_FORMAT)
    return value


def _python_calls(text: str) -> list[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a model's string is none of the user's business
        body = ast.parse(text.strip("[]'"), mode="eval").body
    elements = [body] if isinstance(body, ast.Call) else getattr(body, "elts", None)
    if elements is None or not all(isinstance(element, ast.Call) for element in elements):
        raise SyntaxError("not a list of calls")
    return [_call(element) for element in elements]


def _call(node: ast.Call) -> Call:
    """Positional arguments are not read, as in the official decoder."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return Call(".".join(reversed(parts)), {keyword.arg: _value(keyword.value) for keyword in node.keywords})


def _value(node: ast.AST | None) -> Any:
    """The value of an argument; a name is its own text (a variable), a call inside an argument a call or its text."""
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else node.value
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() | complex() as value)):
            return -value  # whatever the operator: the official decoder reads `+5` and `~5` as -5
        case ast.List():
            return [_value(element) for element in node.elts]
        case ast.Tuple():
            return tuple(_value(element) for element in node.elts)
        case ast.Dict():
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
        case ast.Name():
            return node.id
        case ast.Call():
            if not node.keywords:
                return ast.unparse(node)
            inner = _call(node)
            return {inner.name: inner.arguments}
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
        case ast.BinOp():
            return _arithmetic(node)
    raise SyntaxError(f"unsupported in an argument: {type(node).__name__}")


def _arithmetic(node: ast.AST) -> Any:
    """Arithmetic on numbers and strings. The official decoder calls `eval` here; ours runs nothing, so a name or a call
    in the sum fails."""
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub()):
            return -_arithmetic(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return +_arithmetic(node.operand)
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            left, right = _arithmetic(node.left), _arithmetic(node.right)
            _refuse_large(node.op, left, right)
            return _ARITHMETIC[type(node.op)](left, right)
    raise ValueError("only arithmetic on numbers and strings is computed, nothing is run")


def _refuse_large(op: ast.operator, left: Any, right: Any) -> None:
    """Keeps powers below `MAX_BITS` bits and strings below `MAX_ANSWER_CHARS` characters; `%` on a string can pad."""
    if isinstance(left, str) or isinstance(right, str):
        sizes = [len(value) if isinstance(value, str) else abs(value) for value in (left, right)]
        if isinstance(op, ast.Mod) or sum(sizes) > MAX_ANSWER_CHARS or sizes[0] * sizes[1] > MAX_ANSWER_CHARS:
            raise ValueError("string arithmetic that can grow without bound")
    elif isinstance(op, ast.Pow) and isinstance(left, int) and left.bit_length() * abs(right) > MAX_BITS:
        raise ValueError(f"a power of more than {MAX_BITS} bits")
