"""WikiMix: determinism, splits, and the truth of what its documents state, each checked independently."""

from __future__ import annotations

import collections
import contextlib
import doctest
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from configs.errors import UserError
from federated.data import wikimix
from federated.data.wikimix import words
from tests.support.paths import ROOT

_HASH_PROGRAM = """
import hashlib
from federated.data import wikimix
text = "|".join(t for d in wikimix.DOMAINS for s in wikimix.SPLITS for t in wikimix.documents(d, 20, seed=3, split=s))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def _hash_in_new_process(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _HASH_PROGRAM]
    return subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_stream_is_the_same_in_every_process_and_differs_by_seed() -> None:
    assert _hash_in_new_process("1") == _hash_in_new_process("271828")
    for domain in wikimix.DOMAINS:
        assert wikimix.documents(domain, 5, seed=0) != wikimix.documents(domain, 5, seed=1)
        assert wikimix.documents(domain, 5) == list(itertools.islice(wikimix.stream(domain), 5))


def test_module_is_light() -> None:
    program = (
        "import sys, federated.data.wikimix; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("domain", wikimix.DOMAINS)
def test_splits_are_disjoint_and_documents_have_the_promised_size(domain: str) -> None:
    train = wikimix.documents(domain, 1800)
    valid = wikimix.documents(domain, 100, split="valid") + wikimix.documents(
        domain, 100, seed=5, split="valid"
    )
    assert not set(train) & set(valid)
    assert len(set(train)) > 0.99 * len(train)
    lengths = sorted(map(len, train))
    assert lengths[0] >= 150 and lengths[-1] <= 1500 and 300 <= lengths[len(lengths) // 2] <= 1200


def test_vocabulary_is_rich_without_names_and_numbers() -> None:
    words = {
        word
        for domain in wikimix.DOMAINS
        for text in wikimix.documents(domain, 400)
        for word in re.findall(r"\b[a-z]{2,}\b", text)
    }
    assert 1500 <= len(words) <= 4000


def test_counts_and_names_are_checked() -> None:
    assert wikimix.documents("prose", 0) == []
    assert set(wikimix.HELD_OUT) < set(wikimix.DOMAINS) and len(wikimix.HELD_OUT) == 2
    with pytest.raises(UserError, match="count"):
        wikimix.documents("prose", -1)
    with pytest.raises(UserError, match="did you mean 'recipes'"):
        wikimix.stream("recipe")
    with pytest.raises(UserError, match="did you mean 'valid'"):
        wikimix.documents("prose", 1, split="validation")


def _value(expression: str) -> Fraction:
    """Evaluate integers joined by + - * / and parentheses exactly."""
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def test_templates_are_filled_from_the_inside_out() -> None:
    rng = random.Random(0)
    found = {words.render(rng, "[a {x}|two [big|small] {x}s]!", {"x": "owl"}) for _ in range(100)}
    assert found == {"an owl!", "two big owls!", "two small owls!"}
    assert words.render(rng, "A {x} is a {y}.", {"x": "ape", "y": "bee"}) == "An ape is a bee."
    assert words.lines("\n  - one\n    goes on\n  - two - three\n") == ["one goes on", "two - three"]
    assert words.phrases("\n a b|c\n  d|\n e ") == ["a b", "c d", "e"]
    assert [words.listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert words.sentence("ab Cd") == "Ab Cd" and words.sentence("") == ""
    names = {words.invented_name(rng) for _ in range(500)}
    assert len(names) > 450 and all(re.fullmatch(r"[A-Z][a-z]{3,}", name) for name in names)


def test_arithmetic_is_right() -> None:
    equations = 0
    for text in wikimix.documents("arithmetic", 300):
        for exercise in text.split("\n\n"):
            found = re.findall(r"(?:: |is )([\d(][\d +*/()-]*) = (\d+)\.$", exercise, flags=re.MULTILINE)
            assert exercise.count("=") == len(found) >= 2, exercise
            assert all(_value(left) == int(right) for left, right in found), exercise
            answer = int(re.search(r"^Answer: (\d+)$", exercise, flags=re.MULTILINE).group(1))  # type: ignore[union-attr]
            assert str(answer) in found[-1][0].split() + [found[-1][1]], exercise
            equations += len(found)
    assert equations > 2000


def test_arithmetic_word_problems_follow_from_their_question() -> None:
    shops = 0
    goods = r"(\d+) \w+ at (\d+) coins each"
    pattern = rf"{goods} and {goods}\. .* off (\d+) coins\. .* with (\d+) coins"
    for exercise in "\n\n".join(wikimix.documents("arithmetic", 200)).split("\n\n"):
        if match := re.search(pattern, exercise):
            n, p, m, q, off, paid = map(int, match.groups())
            assert exercise.endswith(f"Answer: {paid - (n * p + m * q - off)}")
            shops += 1
        if match := re.search(r"Solve for (\w): (\d+)\1 plus (\d+) equals (\d+)", exercise):
            a, b, c = map(int, match.groups()[1:])
            assert exercise.endswith(f"Answer: {(c - b) // a}")
        if match := re.search(r"least common multiple of (\d+) and (\d+)", exercise):
            assert exercise.endswith(f"Answer: {math.lcm(*map(int, match.groups()))}")
    assert shops > 20


def test_python_documents_run_and_state_true_results() -> None:
    doctests = prints = 0
    for text in wikimix.documents("python", 150):
        namespace: dict[str, Any] = {"__name__": "document"}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "document", "exec"), namespace)
        stated = re.findall(r"^print\(.*\)  # (.*)$", text, flags=re.MULTILINE)
        # repr is stated, print shows str: they differ only in the quotes of a string.
        assert [line.strip("'") for line in stated] == printed.getvalue().splitlines()
        definitions = [
            value for value in namespace.values() if getattr(value, "__module__", None) == "document"
        ]
        assert len(definitions) == len(re.findall(r"^(?:def|class) ", text, flags=re.MULTILINE))
        for example in (
            x for value in definitions for x in doctest.DocTestParser().get_examples(value.__doc__)
        ):
            assert repr(eval(example.source, namespace)) == example.want.strip()
            doctests += 1
        prints += len(stated)
    assert doctests > 150 and prints > 150


def test_json_documents_parse_and_agree_with_themselves() -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for text in wikimix.documents("json", 300):
        record = json.loads(text)
        assert any(isinstance(value, dict | list) for value in record.values())
        kinds[next(iter(record))] += 1
        if "items" in record:
            assert record["total"] == record["shipping"] + sum(
                x["quantity"] * x["unit_price"] for x in record["items"]
            )
            assert record["item_count"] == len(record["items"])
        if "readings" in record:
            values = [reading["value"] for reading in record["readings"]]
            assert record["summary"] == {"count": len(values), "min": min(values), "max": max(values)}
        if "odometer" in record:
            assert record["distance"] == record["odometer"]["end"] - record["odometer"]["start"]
            assert record["distance"] == sum(leg["distance"] for leg in record["route"]["legs"])
    assert len(kinds) == 5


def test_prose_ages_agree_with_years() -> None:
    lives = 0
    for text in wikimix.documents("prose", 600):
        born = re.search(r"born (\d+) in \w+, died (\d+)", text)
        printed = re.search(r"in (\d{4}), when \w+ was (\d+) years old", text)
        if born and printed:
            assert int(printed.group(1)) - int(born.group(1)) == int(printed.group(2))
            assert int(printed.group(1)) < int(born.group(2))
            lives += 1
    assert lives > 20


def test_recipes_use_every_ingredient() -> None:
    for text in wikimix.documents("recipes", 200):
        ingredients, method = text.split("## Ingredients")[1].split("## Method")
        steps = re.findall(r"^(\d+)\. ", method, flags=re.MULTILINE)
        assert text.startswith("# ") and steps == [str(number) for number in range(1, 9)]
        for line in re.findall(r"^- (.*)$", ingredients, flags=re.MULTILINE):
            assert re.sub(r"s$", "", line.split()[-1]) in method, (line, text)


def test_dialogues_have_two_speakers_who_alternate() -> None:
    for text in wikimix.documents("dialogue", 200):
        speakers = [re.match(r"(\w+): \S", line).group(1) for line in text.splitlines()]  # type: ignore[union-attr]
        assert len(set(speakers)) == 2
        assert all(one != other for one, other in itertools.pairwise(speakers))


@pytest.mark.parametrize("domain", wikimix.DOMAINS)
def test_no_template_is_left_unfilled(domain: str) -> None:
    for text in wikimix.documents(domain, 200):
        assert "{doctest}" not in text and "None" not in text
        if domain in ("prose", "dialogue", "recipes", "arithmetic"):
            assert not re.search(r"[\[\]{}<>]|\w\+|  ", text), text
            assert not re.search(r"\ba [aeiou]", text), text


def _bag(texts: list[str]) -> dict[str, float]:
    """Unit vector of the square roots of word counts."""
    counts = collections.Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    norm = math.sqrt(sum(counts.values()))
    return {word: math.sqrt(count) / norm for word, count in counts.items()}


def test_domains_are_told_apart_by_a_nearest_centroid() -> None:
    centroids = {domain: _bag(wikimix.documents(domain, 200)) for domain in wikimix.DOMAINS}
    right = 0
    for domain in wikimix.DOMAINS:
        for text in wikimix.documents(domain, 50, split="valid"):
            bag = _bag([text])
            scores = {
                name: sum(bag[word] * center.get(word, 0.0) for word in bag)
                for name, center in centroids.items()
            }
            right += max(scores, key=scores.__getitem__) == domain
    assert right > 0.95 * 50 * len(wikimix.DOMAINS)
