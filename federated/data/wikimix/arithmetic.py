"""Worked arithmetic: every step is written out and every equation is true."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from federated.data.wikimix.words import FIRST_NAMES, render

_GOODS = """
    pencils marbles stickers tickets stamps bricks bottles cards beads shells buttons candles tiles ribbons
    notebooks balloons magnets batteries
""".split()
_HOLDERS = "boxes bags crates drawers shelves jars packets trays baskets envelopes".split()
_PLACES = "fair school warehouse museum station club workshop stadium".split()


def _shop(rng: random.Random) -> list[str]:
    """Buying two kinds of goods, a discount and the change."""
    one, two = rng.sample(_GOODS, 2)
    n, m, p, q = rng.randrange(2, 13), rng.randrange(2, 13), rng.randrange(2, 16), rng.randrange(2, 16)
    off = rng.randrange(1, min(n * p, m * q))
    total = n * p + m * q
    paid = (total // 50 + 1) * 50
    facts = {
        "who": rng.choice(FIRST_NAMES),
        "one": one,
        "two": two,
        "n": n,
        "m": m,
        "p": p,
        "q": q,
        "off": off,
        "paid": paid,
    }
    text = (
        "Problem. {who} [buys|orders|picks] {n} {one} at {p} coins each and {m} {two} at {q} coins each. A"
        " coupon takes off {off} coins. {who} pays with {paid} coins. How [many coins|much change] does {who}"
        " get back?"
    )
    return [
        render(rng, text, facts),
        f"Cost of the {one}: {n} * {p} = {n * p}.",
        f"Cost of the {two}: {m} * {q} = {m * q}.",
        f"Together: {n * p} + {m * q} = {total}.",
        f"Minus the coupon: {total} - {off} = {total - off}.",
        f"Change: {paid} - {total - off} = {paid - total + off}.",
        f"Answer: {paid - total + off}",
    ]


def _containers(rng: random.Random) -> list[str]:
    """Filling, giving away and sharing equally with a remainder."""
    n, each, k = rng.randrange(3, 20), rng.randrange(4, 30), rng.randrange(3, 12)
    given = rng.randrange(1, n * each // 2)
    left = n * each - given
    facts = {"who": rng.choice(FIRST_NAMES), "goods": rng.choice(_GOODS), "holders": rng.choice(_HOLDERS)}
    facts |= {"n": str(n), "each": str(each), "k": str(k), "given": str(given), "place": rng.choice(_PLACES)}
    text = (
        "Problem. The {place} [has|stores|keeps] {n} {holders} with {each} {goods} in [each|every one]. {who}"
        " [gives away|loses|sells] {given} {goods} and shares the rest equally among {k} children. How many"
        " {goods} are left over?"
    )
    return [
        render(rng, text, facts),
        f"All {facts['goods']}: {n} * {each} = {n * each}.",
        f"After {facts['who']}: {n * each} - {given} = {left}.",
        f"Each child gets: ({left} - {left % k}) / {k} = {left // k}.",
        f"Handed out: {left // k} * {k} = {left - left % k}.",
        f"Left over: {left} - {left - left % k} = {left % k}.",
        f"Answer: {left % k}",
    ]


def _journey(rng: random.Random) -> list[str]:
    """Distance from two speeds, then the average speed."""
    t1, t2 = rng.randrange(2, 8), rng.randrange(2, 8)
    mean = rng.randrange(35, 90)
    v1 = mean + t2 * rng.choice((-3, -2, -1, 1, 2, 3))
    v2 = ((t1 + t2) * mean - v1 * t1) // t2
    a, b, total = v1 * t1, v2 * t2, v1 * t1 + v2 * t2
    facts = {"who": rng.choice(FIRST_NAMES), "v1": v1, "v2": v2, "t1": t1, "t2": t2}
    text = (
        "Problem. {who} [drives|rides|travels] {t1} hours at {v1} kilometres per hour and then {t2} hours at"
        " {v2} kilometres per hour. [What is the average speed|How fast is that on average]?"
    )
    return [
        render(rng, text, facts),
        f"First part: {v1} * {t1} = {a}.",
        f"Second part: {v2} * {t2} = {b}.",
        f"Distance: {a} + {b} = {total}.",
        f"Time: {t1} + {t2} = {t1 + t2}.",
        f"Average: {total} / {t1 + t2} = {mean}.",
        f"Answer: {mean}",
    ]


def _product(rng: random.Random) -> list[str]:
    """Long multiplication by splitting the second factor into tens and ones."""
    a, b = rng.randrange(12, 400), rng.randrange(11, 99)
    tens, ones = b - b % 10, b % 10
    lines = [f"Multiply {a} by {b}.", f"Split {b}: {tens} + {ones} = {b}."]
    lines += [f"Tens: {a} * {tens} = {a * tens}.", f"Ones: {a} * {ones} = {a * ones}."]
    lines += [f"Sum: {a * tens} + {a * ones} = {a * b}.", f"Check: {a * b} / {b} = {a}.", f"Answer: {a * b}"]
    return lines


def _equation(rng: random.Random) -> list[str]:
    """A linear equation in one unknown, solved and checked."""
    x, a, b = rng.randrange(2, 40), rng.randrange(2, 15), rng.randrange(1, 90)
    name = rng.choice("xyzntk")
    c = a * x + b
    return [
        f"Solve for {name}: {a}{name} plus {b} equals {c}.",
        f"Subtract {b} on both sides: {c} - {b} = {c - b}.",
        f"So {a}{name} equals {c - b}.",
        f"Divide both sides by {a}: {c - b} / {a} = {x}.",
        f"Check: {a} * {x} + {b} = {c}.",
        f"Answer: {x}",
    ]


def _divisor(rng: random.Random) -> list[str]:
    """Euclid's algorithm, then the least common multiple."""
    g = rng.randrange(2, 19)
    a, b = g * rng.randrange(5, 60), g * rng.randrange(3, 40)
    lines = [f"Find the greatest common divisor and the least common multiple of {a} and {b}."]
    p, q = max(a, b), min(a, b)
    while q:
        lines.append(f"Divide {p} by {q}, remainder {p % q}: {p} - {p // q} * {q} = {p % q}.")
        p, q = q, p % q
    lines += [
        f"The last divisor is {p}.",
        f"Product: {a} * {b} = {a * b}.",
        f"Least common multiple: {a * b} / {p} = {math.lcm(a, b)}.",
    ]
    return [*lines, f"Answer: {math.lcm(a, b)}"]


def _sequence(rng: random.Random) -> list[str]:
    """An arithmetic sequence: the next terms one by one, then the sum by pairing."""
    start, step, count = rng.randrange(1, 60), rng.randrange(2, 25), rng.choice((4, 6, 8, 10))
    terms = [start + step * index for index in range(count)]
    lines = [f"A sequence starts at {start} and grows by {step}. Find the sum of its first {count} terms."]
    lines += [f"Term {index + 1}: {terms[index - 1]} + {step} = {terms[index]}." for index in range(1, count)]
    pair = terms[0] + terms[-1]
    lines += [f"First plus last: {terms[0]} + {terms[-1]} = {pair}.", f"Pairs: {count} / 2 = {count // 2}."]
    return [*lines, f"Sum: {pair} * {count // 2} = {sum(terms)}.", f"Answer: {sum(terms)}"]


def _percent(rng: random.Random) -> list[str]:
    """A percentage of a whole, and what remains."""
    share, unit = rng.choice((5, 10, 15, 20, 25, 30, 40, 45, 60, 75, 80)), rng.randrange(1, 30)
    whole = unit * 100
    part = whole * share // 100
    facts = {"place": rng.choice(_PLACES), "goods": rng.choice(_GOODS), "whole": whole, "share": share}
    text = (
        "Problem. The {place} [owns|collects|counts] {whole} {goods}, and {share} percent of them are"
        " [broken|red|old|sold]. How many are not?"
    )
    return [
        render(rng, text, facts),
        f"One percent: {whole} / 100 = {unit}.",
        f"The share: {unit} * {share} = {part}.",
        f"The rest: {whole} - {part} = {whole - part}.",
        f"Check with the other share: 100 - {share} = {100 - share}.",
        f"That is {unit} * {100 - share} = {whole - part}.",
        f"Answer: {whole - part}",
    ]


_KINDS: tuple[Callable[[random.Random], list[str]], ...] = (
    _shop, _containers, _journey, _product, _equation, _divisor, _sequence, _percent,
)  # fmt: skip


def document(rng: random.Random) -> str:
    """Two or three worked exercises; each ends with ``Answer: N``, the value of its last computation."""
    exercises = ["\n".join(rng.choice(_KINDS)(rng)) for _ in range(rng.randrange(2, 4))]
    return "\n\n".join(exercises)
