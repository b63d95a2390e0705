"""Dialogues of two speakers: booking, directions, help, shopping; names, times and prices are consistent."""

from __future__ import annotations

import random

from federated.data.wikimix.words import FIRST_NAMES, invented_name, lines, phrases, render

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_HOURS = "nine ten eleven noon one two three four five six seven eight".split()
_COUNTS = "two three four five six seven eight".split()
_LANDMARKS = phrases("""
    the post office|the bakery|the town hall|the traffic lights|the bus stop|the pharmacy|the fountain|
    the cinema|the bank|the park gate
    """)
_TARGETS = phrases("""
    the train station|the swimming pool|the hospital|the youth hostel|the art gallery|the market square|
    the police station|the airport bus
    """)
_GADGETS = "laptop phone printer washing-machine router dishwasher camera heater microwave tablet".split()
_FAULTS = phrases("""
    keeps making a strange noise|does not switch on|shows a red light|stops after a minute|smells of smoke|
    gets far too hot|freezes all the time
    """)
_CURES = phrases("""
    unplug it and wait ten seconds|hold the button until it blinks|clean the little filter at the back|
    install the latest update|check whether the cable is loose|press reset with a paper clip
    """)
_CLOTHES = "jacket sweater raincoat scarf dress shirt hat belt pair-of-boots swimsuit".split()
_SHADES = "green dark-blue yellow white brown purple orange beige".split()
_SIZES = "small medium large extra-large".split()
_ILLS = phrases("""
    a sore throat|a bad cough|a headache|back pain|a fever|an itchy rash|a twisted ankle|trouble sleeping
    """)
_TITLES = phrases("""
    a guide to birdwatching|a novel about pirates|a book on car repair|a biography of a singer|
    a travel guide|a dictionary
    """)

_SCENES = {
    "booking": lines("""
        - {b}: Good [morning|afternoon|evening], [hotel|restaurant|guest house] {place}, {b} speaking. How
          can I help you?
        - {a}: Hello, my name is {a} {family}. I'd like to book a [table|room] for {count} on {day}, please.
        - {b}: For {count} on {day}, let me have a look. At what time [would you like to come|will you
          arrive]?
        - {a}: Around {hour}, if that's [possible|all right|okay].
        - {b}: I'm afraid {hour} is [fully booked|already taken]. Would {hour2} [suit you|work for you|be
          okay]?
        - {a}: Yes, {hour2} is [fine|perfect|great]. Do we have to pay [in advance|now]?
        - {b}: [Just a deposit of|Only] {price} euros. Could you spell your [last name|surname] for me?
        - {a}: Sure, it's {family}. {spelled}.
        - {b}: Thank you, {a}. So that's {count} people on {day} at {hour2}. [See you then|We look forward
          to seeing you]!
        - {a}: [Thanks a lot|Wonderful, thank you]. [Goodbye|Bye]!
        """),
    "directions": lines("""
        - {a}: Excuse me, [could you tell me|do you know] how to get to {target}?
        - {b}: {target_cap}? [Sure|Of course|No problem]. Are you [on foot|walking] or [driving|taking the
          bus]?
        - {a}: [I'm walking|On foot]. Is it [far|a long way]?
        - {b}: Not really, about {price} minutes. Go straight on until you see {mark1}, then turn {turn1}.
        - {a}: Okay, {turn1} at {mark1}. And [then|after that]?
        - {b}: Walk past {mark2} and take the [first|second|third] street on the {turn2}. You can't miss it.
        - {a}: So it's {turn1} at {mark1}, past {mark2}, then {turn2}. [Did I get that|Is that] right?
        - {b}: [Exactly|That's it|Perfect]. If you reach {mark3}, you've gone too far.
        - {a}: [Thank you so much|That's very kind]. By the way, I'm {a}. [I'm new here|It's my first day
          here].
        - {b}: Nice to meet you, {a}, I'm {b}. [Enjoy your stay|Have a nice day]!
        """),
    "help": lines("""
        - {b}: [Customer service|Technical support|Help desk], this is {b}. What seems to be the problem?
        - {a}: [Hi|Hello] {b}. It's my {gadget}, it {fault}.
        - {b}: Oh, I'm sorry to hear that. Since when [has it been like that|have you had this problem]?
        - {a}: Since {day}. I bought the {gadget} only {count} weeks ago!
        - {b}: I see. [Could you|Would you please] {cure1}?
        - {a}: [One moment|Hang on|Wait a second]... Okay, done. But it still {fault}.
        - {b}: Hmm. Then please {cure2}. [Any change|What happens now|Does that help]?
        - {a}: [Yes|Oh wow|Great], now the {gadget} works again! [What was wrong|So what was it]?
        - {b}: [Nothing serious|Just a small thing]. If it {fault} again, call us before {day2} and ask for
          {b}.
        - {a}: I will. [Thanks for your help|You saved my day], {b}!
        """),
    "shopping": lines("""
        - {b}: Hi there, are you [looking for anything special|finding everything okay]?
        - {a}: Yes, I'm looking for a {shade} {clothes}. It's a [present|birthday gift] for {c}.
        - {b}: How [nice|lovely]! What size does {c} wear?
        - {a}: I think {size}. [How much|What] does this one cost?
        - {b}: The {shade} one is {price} euros. We also have it in {shade2} for {cheap} euros.
        - {a}: {price} is [a bit much|more than I wanted to spend]. But {c} doesn't like {shade2}...
        - {b}: If you pay [cash|by card], I can let you have the {shade} {clothes} for {deal}.
        - {a}: {deal} euros? [That's a deal|Okay, I'll take it]! Can {c} bring it back if it doesn't fit?
        - {b}: [Of course|Sure], until {day}, with the receipt. Shall I wrap it up?
        - {a}: Yes, please. [Thank you|You've been very helpful]!
        """),
    "doctor": lines("""
        - {b}: Doctor {family}'s office, {b} speaking.
        - {a}: Hello, this is {a}. I've had {ill} since {day}. [Could I|Can I] see the doctor?
        - {b}: {ill_cap}, oh dear. Have you been here before, {a}?
        - {a}: Yes, {count} [months|years] ago, because of {ill2}.
        - {b}: I found you. Can you come on {day2} at {hour}?
        - {a}: I have to work until {hour}. Is there [anything else|another time] [that day|on {day2}]?
        - {b}: [Let me check|Let me see]. {hour2_cap} is still free. Shall I put you down?
        - {a}: Yes please, {day2} at {hour2}. [Should I|Do I have to] bring anything?
        - {b}: Just your insurance card. And [drink plenty of tea|get some rest|stay in bed] until then.
        - {a}: I will. Thank you, {b}, see you on {day2}.
        """),
    "library": lines("""
        - {a}: Excuse me, I'd like to [borrow|return] {book}, but I [can't find|have lost] my card.
        - {b}: [Don't worry|That happens]. What's your name?
        - {a}: {a} {family}.
        - {b}: {family}... yes, here you are. You still have {book2} at home. It was due on {day}.
        - {a}: Oh no, I [completely forgot|thought I had more time]! Do I have to pay a fine?
        - {b}: It's {price} cents a day, but if you bring {book2} back by {day2}, [it's free|I'll forget
          about it].
        - {a}: That's really [kind|nice] of you, {b}. I'll bring it at {hour}.
        - {b}: [Good|Perfect]. And {book}, {a}, [is on the second floor|is over there on the left|is next to
          the window].
        - {a}: Great. Until when are you open on {day2}?
        - {b}: Until {hour2}. See you on {day2}!
        """),
}


def _facts(rng: random.Random) -> dict[str, object]:
    """One consistent set of facts; values sampled together are distinct."""
    family, price = invented_name(rng), rng.randrange(20, 95)
    pools = {"a b c": FIRST_NAMES, "day day2": _DAYS, "hour hour2": _HOURS, "count": _COUNTS}
    pools |= {
        "mark1 mark2 mark3": _LANDMARKS,
        "target": _TARGETS,
        "gadget": _GADGETS,
        "fault": _FAULTS,
        "cure1 cure2": _CURES,
    }
    pools |= {
        "clothes": _CLOTHES,
        "shade shade2": _SHADES,
        "size": _SIZES,
        "ill ill2": _ILLS,
        "book book2": _TITLES,
    }
    facts: dict[str, object] = {"family": family, "spelled": "-".join(family.upper())}
    for keys, pool in pools.items():
        facts |= zip(
            keys.split(),
            (word.replace("-", " ") for word in rng.sample(pool, len(keys.split()))),
            strict=True,
        )
    facts |= {
        "turn1": rng.choice(("left", "right")),
        "turn2": rng.choice(("left", "right")),
        "place": invented_name(rng),
    }
    facts |= {"price": price, "cheap": price - rng.randrange(5, 15), "deal": price - rng.randrange(2, 5)}
    return facts | {f"{key}_cap": str(facts[key]).capitalize() for key in ("target", "ill", "hour2")}


def document(rng: random.Random) -> str:
    """One conversation of up to ten turns; the request of the first speaker is agreed on at the end."""
    scene, facts = rng.choice(tuple(_SCENES.values())), _facts(rng)
    return "\n".join(render(rng, turn, facts) for turn in scene)
