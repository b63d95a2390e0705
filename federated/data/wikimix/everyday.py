"""Diary-like paragraphs from a grammar, with the common vocabulary that the other kinds of prose lack."""

from __future__ import annotations

import random
import re

from federated.data.wikimix.words import FIRST_NAMES, invented_name, phrases, render, sentence

_THEMES = {  # name: (nouns, verbs as "present past")
    "kitchen": (
        """
        table cup plate spoon bowl oven pan pot glass bottle cake egg apple lemon onion potato tomato carrot
        soup salad sandwich pear cherry mushroom pie cheese kettle sausage biscuit pancake recipe dish
        """.split(),
        phrases("""
            wash washed|dry dried|cut cut|cook cooked|bake baked|fry fried|boil boiled|mix mixed|
            peel peeled|heat heated|add added|taste tasted|eat ate|chop chopped|stir stirred|serve served|
            cover covered|fill filled|share shared|prepare prepared|slice sliced
            """),
    ),
    "town": (
        """
        shop market hotel restaurant bank station museum church park street corner bridge bus train tram
        ticket map square hospital school office library theatre pharmacy bakery cinema garage entrance
        queue taxi suitcase
        """.split(),
        phrases("""
            find found|leave left|visit visited|see saw|photograph photographed|pass passed|show showed|
            book booked|cancel cancelled|miss missed|describe described|reach reached|recommend recommended|
            mention mentioned|remember remembered|watch watched|choose chose
            """),
    ),
    "clothes": (
        """
        coat shirt shoe bag hat scarf glove sweater dress pocket button umbrella watch wallet ring belt
        jacket suit skirt boot sock size present receipt mirror raincoat
        """.split(),
        phrases("""
            buy bought|sell sold|wear wore|try tried on|wash washed|lose lost|return returned|pay paid for|
            order ordered|wrap wrapped|repair repaired|borrow borrowed|hang hung up|like liked|need needed|
            want wanted|give gave away|forget forgot
            """),
    ),
    "house": (
        """
        door window chair bed lamp clock phone radio printer computer camera key drawer shelf blanket pillow
        carpet stair roof kitchen room heater cable switch hammer ladder bucket broom fridge machine button
        """.split(),
        phrases("""
            open opened|close closed|clean cleaned|paint painted|break broke|repair repaired|carry carried|
            move moved|drop dropped|check checked|push pushed|pull pulled|hold held|hide hid|
            measure measured|install installed|replace replaced|touch touched|hear heard
            """),
    ),
    "country": (
        """
        tree flower rose leaf branch stone hill pond boat fence gate tent field farm dog cat horse cow goat
        sheep chicken duck pigeon spider fish mouse island mountain forest river beach path cloud
        """.split(),
        phrases("""
            see saw|watch watched|feed fed|catch caught|chase chased|draw drew|plant planted|count counted|
            follow followed|protect protected|find found|climb climbed|love loved|fear feared|
            discover discovered|hear heard|cross crossed|describe described
            """),
    ),
}
_MASS = """
    water flour honey rain snow smoke dust sand wood paper cotton wool iron gold advice luck music news time
    work money bread milk homework furniture luggage traffic garlic pepper oil vinegar cream jam pasta rice
    sugar salt butter tea coffee soap
""".split()
_ADJECTIVES = """
    small large big old new heavy light warm cold hot dry wet clean dirty empty full open broken cheap
    expensive sweet sour bitter fresh soft hard round flat thin thick long short wide narrow quick slow loud
    quiet bright dark red green blue yellow white brown pink strange funny pretty ugly perfect terrible
    simple difficult tiny huge favourite
""".split()
_MOVES = phrases("""
    walk walked|run ran|drive drove|swim swam|climb climbed|hurry hurried|come came|go went|
    travel travelled|turn turned|wait waited|sit sat|stand stood|stay stayed|sleep slept|sing sang|
    dance danced|laugh laughed|smile smiled|cry cried|talk talked|shout shouted
    """)
_RULES = {
    "who": phrases("{me}|{friend}|I|we|they|my <kin>|{me}'s <kin>|somebody|the <job>|everyone"),
    "kin": phrases("""
        mother|father|sister|brother|aunt|uncle|grandmother|neighbour|cousin|friend|boss
        """),
    "job": phrases("""
        waiter|nurse|doctor|teacher|driver|farmer|cook|baker|clerk|guide|girl|boy|woman|man
        """),
    "what": phrases("""
        the {thing}|a <adj> {thing}|the <adj> <noun>|a <noun>|two <noun>+|{count} <noun>+|some <mass>|
        a little <mass>|it|them|my <noun>|her <noun>|his <noun>|this <noun>|the {thing} and the <noun>
        """),
    "place": phrases("""
        in {place}|at the <noun>|near the <noun>|behind the {thing}|next to the <noun>|under the <noun>|
        over there|at home|downstairs|on the left
        """),
    "where": phrases("""
        <place>|<place>|on the <adj> <noun>|towards the <noun>|to {place}|from the <noun>
        """),
    "when": phrases("""
        on <day>|at <hour>|yesterday|today|tomorrow|in the morning|every evening|last <day>|
        after {count} minutes|for {count} hours|before <hour>|at once|again|later|too early
        """),
    "day": phrases("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"),
    "hour": phrases("noon|midnight|one|two|three|four|five|six|seven|eight|nine|ten|eleven"),
    "modal": phrases("can|could|will|would|should|must|might|may|didn't|wouldn't|won't|can't"),
    "why": phrases("""
        because <who> <past> <what>|because <who> <moved> <where>|so <who> <past> <what>|
        but <who> <modal> <base> <what>|and then <who> <moved> <where>|although it was <adj>|
        if <who> <modal> <base> it|until the {thing} was <adj>|while <who> <moved> <where>
        """),
    "feel": phrases("""
        sorry|happy|afraid|sure|glad|tired|hungry|thirsty|late|ready|busy|angry|ill|surprised
        """),
    "yes": phrases("""
        Yes|No|Well|Oh|Okay|Sure|Thank you|Excuse me|Please|Hello|Of course|Perhaps|Great
        """),
    "say": phrases("""
        <yes>, <who> <modal> <base> <what>.|Where is the {thing}?|How much is the <noun>?|
        What is <adj> about the <noun>?|<yes>, I'm <feel>.|Do you <base> <what> <when>?|
        <base> the {thing}, please.|That's <adj>, isn't it?|It's {count} minutes past <hour>.|
        I'd <base> <what> if I were you.|Let's <move> <where>!|Don't <base> <what>!|Have you been <where>?|
        Can I <base> <what>, {friend}?|You're <feel>, {me}, aren't you?|<yes>! There's a <noun> <place>.|
        It costs {count} euros, which is <adj>.
        """),
    "top": phrases("""
        <who> <past> <what> <when>.|<who> <moved> <where>, <why>.|<who> <past> <what> <where>, <why>.|
        <when>, <who> <past> <what>.|It was <adj> and <adj>, <why>.|There was a <noun> <place>.|
        <who> felt <feel>, <why>.|<who> <modal> <base> <what> <where>.|<who> said: "<say>"|"<say> <say>"|
        <who> asked: "<say>" "<say>"|If <who> <past> <what>, <who> <modal> <move> <where>.|
        First <who> <past> <what>, then <what>, and at last <what>.|
        <base> <what>, then <base> <what> and <move> <where>.|
        The {thing} was <adj>, the <noun> was <adj>, and <who> felt <feel>.|
        Why did <who> <base> <what> <when>? Nobody knew.
        """),
}
_SYMBOL = re.compile(r"<(\w+)>")
_PLURAL = re.compile(r"(\w+)\+")
_IRREGULAR = {
    "mouse": "mice",
    "shelf": "shelves",
    "leaf": "leaves",
    "scarf": "scarves",
    "sheep": "sheep",
    "fish": "fish",
}


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return _IRREGULAR.get(noun) or noun + ("es" if noun.endswith(("ch", "sh", "x", "s", "ato")) else "s")


def _expand(rng: random.Random, symbol: str, theme: tuple[list[str], list[str]]) -> str:
    """One random expansion of a grammar symbol; nouns and verbs come from the theme."""
    nouns, verbs = theme
    if symbol in ("base", "past"):
        return rng.choice(verbs).split(" ", 1)[symbol == "past"]
    if symbol in ("move", "moved"):
        return rng.choice(_MOVES).split(" ", 1)[symbol == "moved"]
    words = {"noun": nouns, "mass": _MASS, "adj": _ADJECTIVES}.get(symbol)
    text = rng.choice(words or _RULES[symbol])
    return _SYMBOL.sub(lambda match: _expand(rng, match.group(1), theme), text)


def _start_upper(text: str) -> str:
    """Upper case at the start of the line, of each quotation and of each sentence."""
    return re.sub(
        r"(?:(?<=^\")|(?<= \")|(?<=[.?!] ))[a-z]", lambda match: match.group().upper(), sentence(text)
    )


def document(rng: random.Random) -> str:
    """Six to twelve sentences on one theme, with two people, a place and a thing in all of them."""
    me, friend = rng.sample(FIRST_NAMES, 2)
    theme = rng.choice(tuple(_THEMES.values()))
    facts = {"me": me, "friend": friend, "place": invented_name(rng), "thing": rng.choice(theme[0])}
    facts |= {"count": str(rng.randrange(2, 61))}
    lines = [render(rng, _expand(rng, "top", theme), facts) for _ in range(rng.randrange(6, 13))]
    return " ".join(_start_upper(_PLURAL.sub(lambda match: _plural(match.group(1)), line)) for line in lines)
