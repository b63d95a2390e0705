"""Text functions of all domains: templates, invented names, lists, articles."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")

FIRST_NAMES = """
    Ada Amir Anja Anton Aria Basil Bela Carla Cedric Clara Dara Dmitri Edith Elena Emil Esther Farid Fiona
    Freya Gideon Greta Hana Hugo Ida Imani Ines Ivan Jonas Julia Kamal Karin Kofi Lena Leo Lucia Magnus Mara
    Marta Milo Mina Nadia Nils Noor Olga Omar Oscar Paula Petra Quentin Rafael Rosa Ruben Sara Selma Silas
    Tara Theo Tilda Uma Victor Vera Wanda Xenia Yara Yusuf Zoe
""".split()
_ONSETS = """
    Al Bar Bel Cor Dal Dor El Fen Gal Har Il Jor Kel Lor Mar Mor Nar Or Pel Quel Ras Sel Tal Tor Ul Vel Wen
    Yar Zel
""".split()
_MIDDLES = "a an ar av e el en er i il in ir o ol on or u um un".split()
_ENDINGS = "bet dan dor fal gard ka len lis mar mere na nor rin ros sa tel th vik vra wick".split()


def phrases(block: str) -> list[str]:
    """Split a block of text into its ``|``-separated phrases; line breaks count as spaces."""
    return [" ".join(part.split()) for part in block.split("|")]


def lines(block: str) -> list[str]:
    """Split a block of text into templates; each starts with ``- `` and may continue on the next line."""
    return [" ".join(part.split()) for part in re.split(r"(?:^|\n)\s*- ", block)[1:]]


def render(rng: random.Random, template: str, facts: Mapping[str, object]) -> str:
    """Choose every ``[a|b|c]`` from the inside out, fill every ``{fact}``, then turn ``a`` into ``an``."""
    while _CHOICE.search(template):
        template = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return _ARTICLE.sub(r"\1n ", template.format_map(facts))


def invented_name(rng: random.Random) -> str:
    """A capitalized name of three syllables (29 x 19 x 20 combinations), for a place or a family."""
    return rng.choice(_ONSETS) + rng.choice(_MIDDLES) + rng.choice(_ENDINGS)


def listed(items: Sequence[str], last: str = "and") -> str:
    """``a``, ``a and b`` or ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
