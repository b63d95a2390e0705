"""Short encyclopaedia-like and story-like paragraphs about invented towns, animals, materials and people."""

from __future__ import annotations

import random

from federated.data.wikimix.everyday import document as everyday_document
from federated.data.wikimix.words import FIRST_NAMES, invented_name, lines, render

_LANDSCAPES = """
    valley plateau marsh delta peninsula highland forest coast desert island basin canyon steppe moor
""".split()
_TRADES = """
    weaver potter astronomer cartographer blacksmith botanist glassblower mason sailor composer surgeon
    printer clockmaker philosopher sculptor shipwright historian falconer
""".split()
_CRAFTS = """
    silk pottery lanterns barrels timber paper bronze saddles rope dyes glass carpets bells leather amber
""".split()
_BUILDINGS = """
    cathedral lighthouse library observatory monastery fortress aqueduct granary theatre harbour bridge
    palace mill archive tower
""".split()
_RULERS = "queen council king bishop duke governor abbess guild".split()
_DISASTERS = "flood fire plague drought earthquake siege famine landslide storm".split()
_ANIMALS = """
    heron lizard otter beetle antelope owl moth tortoise fox crane viper badger falcon hare salamander lynx
""".split()
_COLOURS = "grey crimson golden pale spotted silver black russet striped ivory bluish copper".split()
_FOODS = "seeds insects moss fish roots snails lichen berries worms frogs bark nectar".split()
_MATERIALS = "crystal resin alloy clay fibre stone salt ore wax pigment".split()
_PROPERTIES = """
    brittle translucent magnetic fragrant heavy porous elastic luminous bitter dense waterproof soft
""".split()
_USES = "lenses roofs armour candles ink compasses medicine jewellery instruments sails pipes coins".split()
_TOPICS = """
    tides comets fungi glaciers dialects fossils magnetism orchids eclipses migration bridges harmonies
""".split()
_OBJECTS = "key letter map mirror drum compass coin lantern ring feather clock book knife seed box".split()
_MOODS = "quiet proud curious stubborn gentle lonely brave clever weary restless honest cautious".split()
_WEATHER = "rain snow fog wind thunder frost moonlight dusk mist heat".split()
_EVERYDAY = 0.4  # share of documents with everyday sentences
_DIRECTIONS = "north south east west".split()

_TOWN = lines("""
    - {name} is a [small|large|walled|prosperous|remote|busy] [town|city|settlement] in the {region}
      {landscape}, on the [{dir1}ern|left|right|steep] bank of the river {river}.
    - It was founded in {year} by the {trade} {founder}, who [built|raised|planned] the first {building}
      [there|beside the water|on a hill above the river].
    - For [many years|two centuries|generations] the people of {name} lived from {craft1} and {craft2},
      which were [sold|carried|shipped] down the {river} to the markets of {other}.
    - In {year2}, {age} years after its foundation, a {disaster} destroyed the {dir2}ern quarter, and the
      {building} [was badly damaged|was lost|alone remained standing].
    - The {ruler} of {other} then [sent|granted|lent] [grain|money|stone|workers] to {name}, and the two
      towns have been [allies|rivals|partners] ever since.
    - The [population|number of inhabitants] [fell|sank] from {people} to {fewer} during the {disaster}, but
      [recovered|grew again] within a generation.
    - Today {name} is [known|famous|visited] for its {building}, its {craft1} and the
      [annual|yearly|ancient] festival of {founder}, held every [spring|summer|autumn|winter].
    - The name {name} probably comes from an old word for [river|bridge|winter|shelter|stone|salt|wolf].
    """)
_ANIMAL = lines("""
    - The {colour} {animal} of {region}, also called the {name} {animal}, is a
      [rare|common|solitary|nocturnal|shy] [species|creature] of the {region} {landscape}.
    - An adult {animal} weighs about {weight} grams and measures {length} centimetres; the [males|females]
      are [slightly|much|noticeably] larger and have a {colour} [tail|back|throat|crest].
    - It [feeds|lives] mainly on {food1} and {food2}, which it finds [at night|at dawn|after rain|under
      stones|along the river {river}].
    - In the cold season, when {food1} [become|are] scarce, the {colour} {animal} [migrates|moves|wanders]
      {dir1} and [survives|lives] on {food3} alone.
    - The female [lays|guards|hides] {eggs} eggs in a nest of {nest}, and the young [leave|abandon] it after
      {weeks} weeks.
    - The {trade} {founder} [first described|discovered|drew] the species in {year} near {other}, and for
      {age} years nobody saw it again, until it was found in {year2}.
    - Its only enemies are the {enemy} and the [winter|farmer|hunter|{disaster}]; [fewer than|about|more
      than] {people} animals are [thought to remain|left in the wild].
    - The {ruler} of {other} has [protected|forbidden hunting] the {animal} since {year2}.
    """)
_MATERIAL = lines("""
    - {name}ite is a {property1}, {property2} {material} [found|mined|gathered] [only|chiefly|mostly] in the
      {region} {landscape}.
    - It was [discovered|first described|noticed] in {year} by the {trade} {founder}, who was
      [searching|looking] for {craft1} along the river {river}.
    - Pure {name}ite is {colour} and {property1}; when [heated|ground|washed|polished] it
      [slowly|suddenly|gradually] becomes {property3}.
    - Because it is {property2}, the {material} is used for {use1} and {use2}, and in {other} also for
      {use3}.
    - In {year2}, {age} years after {founder} [found it|described it], the {ruler} of {other}
      [taxed|forbade|praised] the trade in {name}ite.
    - About {people} tonnes are [produced|shipped] every year; the [largest|oldest|deepest] mine lies {dist}
      kilometres {dir1} of {other}.
    - [Workers|Miners] once [believed|claimed] that {name}ite protects against {disaster} and that a
      {animal} never [sleeps|walks] near it.
    - A similar but less {property1} {material} is known from the {dir2}ern {landscape2}, yet it cannot be
      used for {use1}.
    """)
_PERSON = lines("""
    - {founder} {name} (born {year} in {other}, died {death}) was a {trade} and a [student|teacher|scholar]
      of {topic1}.
    - The [daughter|son|child] of a {trade2}, {founder} [left|fled] {other} after the {disaster} of {youth}
      and settled in the {region} {landscape}.
    - There, at the age of {age1}, {name} [began|started] to [study|record|measure] {topic1}, and
      [later|soon] {topic2} as well.
    - The [main|best known|longest] work, a book about {topic1} and the {animal}, [appeared|was printed] in
      {printed}, when {name} was {age2} years old.
    - The {ruler} of {region} [admired|feared|rejected] it, because it [claimed|showed|proved] that {topic1}
      [depend|depended] on the {weather}.
    - {founder} {name} never [married|travelled|returned to {other}] and [lived|worked] in a {building}
      [near|beside] the river {river}.
    - After {name} died in {death}, at the age of {age3}, the {building} became a
      [museum|school|ruin|library] that still [keeps|shows] the [notes|drawings|letters] about {topic2}.
    - A [street|crater|ship|square] in {other} bears the name of the {trade}.
    """)
_STORY = lines("""
    - Once there was a {mood1} {trade} named {founder}, who lived in {other} beside a {colour} {building}.
    - One evening, in the {weather}, {founder} found a {colour2} {object} [under a stone|by the river
      {river}|behind the {building}|in the {landscape}].
    - "This {object} [is not mine|belongs to somebody|must be very old]," {founder} [thought|said], and
      [carried|took] it home [all the same|in a sack|with care].
    - That night a {mood2} {animal} came to the door and [asked|begged] for the {object}.
    - "[Give it back|I have lost it|It was my mother's]," said the {animal}, "and I will [show|teach] you
      the [road|way] to {name}."
    - The {mood1} {trade} [hesitated|laughed|wept], because nobody in {other} had seen {name} since the
      {disaster}.
    - For {weeks} days they [walked|travelled] {dir1} through the {landscape} of {region}, and the {animal}
      ate only {food1} while {founder} ate {food2}.
    - When they [reached|saw] {name}, the {weather} [stopped|cleared], and the {object} [began to shine|grew
      warm|broke in two].
    - The {trade} [understood|knew] then why the {animal} had been so {mood2}: the {object} had
      [opened|closed|guarded] the {building} of {name} all along.
    - {founder} [stayed|returned home], and to this day the people of {other} tell of the {mood1} {trade}
      and the {mood2} {animal}.
    """)


def _people(rng: random.Random) -> dict[str, object]:
    """Facts of a life whose years and ages agree."""
    year = rng.randrange(1100, 1880)
    age1, age2 = rng.randrange(18, 30), rng.randrange(31, 52)
    age3 = age2 + rng.randrange(4, 30)
    return {
        "youth": year + rng.randrange(9, 17),
        "age1": age1,
        "age2": age2,
        "age3": age3,
        "printed": year + age2,
        "death": year + age3,
        "year": year,
    }


def _facts(rng: random.Random) -> dict[str, object]:
    """One consistent set of facts; words of one kind never repeat within a document."""
    people = rng.randrange(12, 90)
    facts: dict[str, object] = _people(rng)
    age = rng.randrange(20, 240)
    facts |= {"age": age, "year2": int(str(facts["year"])) + age, "people": people * 100}
    facts |= {
        "fewer": people * rng.randrange(20, 70),
        "weight": rng.randrange(3, 90) * 10,
        "length": rng.randrange(6, 95),
    }
    facts |= {"eggs": rng.randrange(2, 9), "weeks": rng.randrange(3, 15), "dist": rng.randrange(4, 80)}
    facts |= {
        "founder": rng.choice(FIRST_NAMES),
        "nest": rng.choice(["grass", "mud", "feathers", "twigs", "moss", "reeds"]),
    }
    places = ("name", "other", "region", "river")
    facts |= {key: invented_name(rng) for key in places}
    pools = {
        "landscape landscape2": _LANDSCAPES,
        "trade trade2": _TRADES,
        "craft1 craft2": _CRAFTS,
        "building": _BUILDINGS,
    }
    pools |= {"ruler": _RULERS, "disaster": _DISASTERS, "animal enemy": _ANIMALS, "colour colour2": _COLOURS}
    pools |= {
        "food1 food2 food3": _FOODS,
        "material": _MATERIALS,
        "property1 property2 property3": _PROPERTIES,
    }
    pools |= {"use1 use2 use3": _USES, "topic1 topic2": _TOPICS, "object": _OBJECTS, "mood1 mood2": _MOODS}
    pools |= {"weather": _WEATHER, "dir1 dir2": _DIRECTIONS}
    for keys, pool in pools.items():
        facts |= zip(keys.split(), rng.sample(pool, len(keys.split())), strict=True)
    return facts


def document(rng: random.Random) -> str:
    """One paragraph of five to twelve sentences; names, years and ages agree throughout."""
    if rng.random() < _EVERYDAY:
        return everyday_document(rng)
    kind = rng.choice((_TOWN, _ANIMAL, _MATERIAL, _PERSON, _STORY))
    facts = _facts(rng)
    if kind is _STORY:
        return " ".join(render(rng, line, facts) for line in kind)
    kept = sorted(rng.sample(range(1, len(kind)), rng.randrange(4, len(kind))))
    return " ".join(render(rng, kind[index], facts) for index in [0, *kept])
