"""WikiMix: generator of an endless, deterministic stream of documents in six distinct domains.

All text is generated from word lists, templates and small grammars. The split of a document is a function of the hash
of its text, so that no document is in both splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from configs.errors import UserError, nearest
from federated.data.wikimix import arithmetic, dialogue, programs, prose, recipes, records

_GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "prose": prose.document,
    "arithmetic": arithmetic.document,
    "python": programs.document,
    "json": records.document,
    "dialogue": dialogue.document,
    "recipes": recipes.document,
}

DOMAINS: tuple[str, ...] = tuple(_GENERATORS)
"""Names of all domains."""
HELD_OUT: tuple[str, ...] = ("dialogue", "recipes")
"""Domains that the demo model was not trained on."""
SPLITS: tuple[str, ...] = ("train", "valid")
"""About nine of ten documents are ``train``, the others ``valid``."""

_VALID_SHARE = 10


def _split_of(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") % _VALID_SHARE == 0 else "train"


def _check(word: str, known: tuple[str, ...], kind: str) -> None:
    if word not in known:
        raise UserError(
            f"expected a wikimix {kind} out of {', '.join(known)}, got {word!r}{nearest(word, known)}"
        )


def stream(domain: str, seed: int = 0, split: str = "train") -> Iterator[str]:
    """Endless documents of ``domain``; equal (domain, seed, split) yield equal documents.

    Raises ``UserError`` at once, not at the first document, for an unknown domain or split.
    """
    _check(domain, DOMAINS, "domain")
    _check(split, SPLITS, "split")
    # A string seed goes through SHA-512, so neither PYTHONHASHSEED nor the platform matters.
    rng = random.Random(f"wikimix/{domain}/{seed}")
    texts = (_GENERATORS[domain](rng) for _ in itertools.count())
    return (text for text in texts if _split_of(text) == split)


def documents(domain: str, count: int, *, seed: int = 0, split: str = "train") -> list[str]:
    """The first ``count`` documents of :func:`stream`; ``UserError`` for a negative count."""
    if count < 0:
        raise UserError(f"expected a document count of 0 or more, got {count}")
    return list(itertools.islice(stream(domain, seed, split), count))
