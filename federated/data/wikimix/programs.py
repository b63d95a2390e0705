"""Small correct Python programs; stated results are computed by running them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_NOUNS = """
    values scores weights prices depths speeds levels ranks lengths counts offsets samples tokens heights
    delays sizes grades widths
""".split()
_VERBS = "sum collect filter scan reduce measure gather inspect process compute".split()
_ITEMS = "item value entry element number current".split()
_TOTALS = "total result answer accumulator output".split()
_TEXTS = "word text line phrase label title name".split()
_SAMPLES = """
    lambda array kernel buffer thread vector matrix socket branch commit module object string parser stack
    query index cursor method static
""".split()
_CLASSES = "Counter Stack Account Tracker Register Meter Ledger Tank Robot Timer".split()
_METHODS = (
    ("add", "remove"),
    ("push", "drop"),
    ("deposit", "withdraw"),
    ("fill", "drain"),
    ("raise_by", "lower_by"),
)

Program = tuple[str, list[str]]  # source with one {doctest} line, and the calls whose results are to be shown


def _numbers(rng: random.Random, low: int = 0, high: int = 40) -> list[int]:
    return [rng.randrange(low, high) for _ in range(rng.randrange(3, 7))]


def _signature(rng: random.Random, suffix: str) -> tuple[str, str, str, str]:
    """Names of one function: its own, its argument, its loop variable, its accumulator."""
    noun = rng.choice(_NOUNS)
    return f"{rng.choice(_VERBS)}_{noun}{suffix}", noun, rng.choice(_ITEMS), rng.choice(_TOTALS)


def _filtered_sum(rng: random.Random) -> Program:
    name, arg, item, total = _signature(rng, rng.choice(("", "_above", "_below")))
    bound, sign, factor = rng.randrange(3, 25), rng.choice("<>"), rng.randrange(2, 6)
    compare = "above" if sign == ">" else "below"
    source = f'''def {name}({arg}, limit={bound}):
    """Return {factor} times the sum of all {arg} {compare} the limit.

    {{doctest}}
    """
    {total} = 0
    for {item} in {arg}:
        if {item} {sign} limit:
            {total} += {factor} * {item}
    return {total}'''
    return source, [
        f"{name}({_numbers(rng)})",
        f"{name}({_numbers(rng)})",
        f"{name}({_numbers(rng)}, limit={rng.randrange(30)})",
    ]


def _mapped(rng: random.Random) -> Program:
    name, arg, item, _ = _signature(rng, "_list")
    a, b, mod = rng.randrange(2, 9), rng.randrange(1, 20), rng.randrange(2, 5)
    source = f'''def {name}({arg}):
    """Scale the {arg} by {a}, shift them by {b} and keep multiples of {mod}.

    {{doctest}}
    """
    scaled = [{a} * {item} + {b} for {item} in {arg}]
    return [{item} for {item} in scaled if {item} % {mod} == 0]'''
    return source, [f"{name}({_numbers(rng)})" for _ in range(3)]


def _counted(rng: random.Random) -> Program:
    name, arg = f"count_{rng.choice(('letters', 'symbols', 'chars'))}", rng.choice(_TEXTS)
    total = rng.choice(("table", "counts", "histogram", "seen"))
    source = f'''def {name}({arg}):
    """Map every character of the {arg} to how often it occurs.

    {{doctest}}
    """
    {total} = {{{{}}}}
    for char in {arg}:
        {total}[char] = {total}.get(char, 0) + 1
    return {total}'''
    return source, [f"{name}({word!r})" for word in rng.sample(_SAMPLES, 2)]


def _recursive(rng: random.Random) -> Program:
    base, factor, minus = rng.randrange(1, 8), rng.randrange(2, 5), rng.randrange(1, 3)
    name = (
        rng.choice(("grow", "series", "recur", "descend", "chain"))
        + f"_{rng.choice(('slow', 'fast', 'steps'))}"
    )
    source = f'''def {name}(n):
    """Compute the recursive series that starts at {base}.

    {{doctest}}
    """
    if n <= {minus}:
        return {base}
    return {factor} * {name}(n - {minus}) + n'''
    return source, [f"{name}({n})" for n in sorted(rng.sample(range(1, 10), 3))]


def _while_loop(rng: random.Random) -> Program:
    divisor, name = rng.randrange(2, 8), rng.choice(("halve", "shrink", "divide_down", "count_steps"))
    steps, arg = rng.choice(("steps", "rounds", "loops")), rng.choice(("n", "number", "start"))
    source = f'''def {name}({arg}):
    """Count how often {arg} can be divided by {divisor} before it is zero.

    {{doctest}}
    """
    {steps} = 0
    while {arg} > 0:
        {arg} = {arg} // {divisor}
        {steps} += 1
    return {steps}'''
    return source, [f"{name}({rng.randrange(1, 5000)})" for _ in range(3)]


def _class(rng: random.Random) -> Program:
    cls, (up, down), noun = rng.choice(_CLASSES), rng.choice(_METHODS), rng.choice(_NOUNS)
    floor = rng.randrange(0, 4)
    source = f'''class {cls}:
    """Keep track of {noun}; never falls under {floor}."""

    def __init__(self, {noun}={floor}):
        self.{noun} = {noun}

    def {up}(self, amount):
        self.{noun} += amount
        return self

    def {down}(self, amount):
        self.{noun} = max({floor}, self.{noun} - amount)
        return self'''
    a, b, c = rng.randrange(5, 40), rng.randrange(1, 30), rng.randrange(1, 30)
    calls = [
        f"{cls}({a}).{up}({b}).{noun}",
        f"{cls}({a}).{down}({c}).{noun}",
        f"{cls}().{up}({b}).{down}({c}).{noun}",
    ]
    return source, calls


def _strings(rng: random.Random) -> Program:
    arg, sep = rng.choice(_TEXTS), rng.choice(("-", "_", ".", "/", "+"))
    step, body = rng.choice((
        ("reversed", f"parts = [part[::-1] for part in {arg}.split()]"),
        ("in upper case", f"parts = [part.upper() for part in {arg}.split()]"),
        ("sorted by length", f"parts = sorted({arg}.split(), key=len)"),
        ("sorted", f"parts = sorted({arg}.split())"),
        ("cut to three letters", f"parts = [part[:3] for part in {arg}.split()]"),
    ))  # fmt: skip
    name = f"{rng.choice(('join', 'format', 'convert', 'render'))}_{arg}"
    source = f'''def {name}({arg}):
    """Split the {arg} at spaces and join its parts, {step}, with {sep!r}.

    {{doctest}}
    """
    {body}
    return {sep!r}.join(parts)'''
    return source, [f"{name}({' '.join(rng.sample(_SAMPLES, rng.randrange(2, 4)))!r})" for _ in range(2)]


def _pairs(rng: random.Random) -> Program:
    left, right = rng.sample(_NOUNS, 2)
    symbol, word = rng.choice((("*", "product"), ("+", "sum"), ("-", "difference")))
    name = f"{word}_of_{left}"
    source = f'''def {name}({left}, {right}):
    """Return the {word} of {left} and {right} at each index.

    {{doctest}}
    """
    if len({left}) != len({right}):
        raise ValueError("{left} and {right} differ in length")
    return [a {symbol} b for a, b in zip({left}, {right})]'''
    calls = []
    for _ in range(2):
        one = _numbers(rng, 0, 20)
        calls.append(f"{name}({one}, {[rng.randrange(20) for _ in one]})")
    return source, calls


def _search(rng: random.Random) -> Program:
    name, arg, item, best = _signature(rng, "_best")
    sign, extreme = rng.choice((("<", "smallest"), (">", "largest")))
    mod = rng.randrange(3, 9)
    source = f'''def {name}({arg}):
    """Return the index of the entry with the {extreme} remainder modulo {mod}.

    {{doctest}}
    """
    {best} = 0
    for index, {item} in enumerate({arg}):
        if {item} % {mod} {sign} {arg}[{best}] % {mod}:
            {best} = index
    return {best}'''
    return source, [f"{name}({_numbers(rng, 1, 60)})" for _ in range(3)]


def _running(rng: random.Random) -> Program:
    name, arg, item, total = _signature(rng, "_running")
    start = rng.randrange(0, 10)
    source = f'''def {name}({arg}, start={start}):
    """Yield the running total of the {arg}, beginning at start.

    {{doctest}}
    """
    {total} = start
    for {item} in {arg}:
        {total} += {item}
        yield {total}'''
    return source, [f"list({name}({_numbers(rng)}))" for _ in range(2)]


def _predicate(rng: random.Random) -> Program:
    a, b = rng.sample(range(2, 10), 2)
    name, word = rng.choice((("is_valid", "and"), ("is_allowed", "or"), ("is_special", "and not")))
    source = f'''def {name}(n):
    """Check n modulo {a} {word} modulo {b}.

    {{doctest}}
    """
    return n % {a} == 0 {word} n % {b} == 0'''
    values = [rng.randrange(1, 100), a * rng.randrange(1, 12), a * b]
    return source, [f"{name}({value})" for value in values] + [f"[n for n in range(20) if {name}(n)]"]


_KINDS: tuple[Callable[[random.Random], Program], ...] = (
    _filtered_sum, _mapped, _counted, _recursive, _while_loop, _class, _strings, _pairs, _search, _running,
    _predicate,
)  # fmt: skip


def _program(rng: random.Random, kind: Callable[[random.Random], Program]) -> str:
    """One definition and its calls: some as doctest, the others printed with the result as a comment."""
    source, calls = kind(rng)
    namespace: dict[str, Any] = {}
    # Only text made above is run; running it is what makes every stated result true.
    exec(source.format(doctest="") if "{doctest}" in source else source, namespace)  # noqa: S102
    results = [repr(eval(call, namespace)) for call in calls]  # noqa: S307
    shown = rng.randrange(1, len(calls)) if "{doctest}" in source else 0
    lines = [f">>> {call}\n    {result}" for call, result in zip(calls[:shown], results[:shown], strict=True)]
    text = source.format(doctest="\n    ".join(lines)) if shown else source
    prints = [
        f"print({call})  # {result}" for call, result in zip(calls[shown:], results[shown:], strict=True)
    ]
    return text + "\n\n\n" + "\n".join(prints)


def document(rng: random.Random) -> str:
    """A module of two or three definitions; ``# RESULT`` behind a print and every doctest are true."""
    kinds = rng.sample(_KINDS, rng.randrange(2, 4))  # different kinds, so no name is defined twice
    return "\n\n\n".join(_program(rng, kind) for kind in kinds) + "\n"
