"""Recipes in Markdown: every listed ingredient is used in a step, and times and servings agree."""

from __future__ import annotations

import random

from federated.data.wikimix.words import lines, listed, phrases, render, sentence

_STYLES = "rustic creamy spicy crispy smoky tangy hearty light golden zesty homemade festive".split()
_BASES = (
    ("risotto", "rice", "g"), ("stew", "potatoes", "g"), ("pasta", "penne", "g"), ("curry", "chickpeas", "g"),
    ("soup", "lentils", "g"), ("bake", "macaroni", "g"), ("salad", "couscous", "g"), ("pilaf", "bulgur", "g"),
    ("stir-fry", "noodles", "g"), ("casserole", "beans", "g"), ("gratin", "parsnips", "g"),
    ("broth", "barley", "g"),
)  # fmt: skip
_SWEETS = "muffins pancakes scones biscuits brownies tart cake pudding flapjacks crumble waffles".split()
_VEGETABLES = """
    leeks carrots spinach mushrooms tomatoes courgettes aubergines peppers broccoli cabbage celery pumpkin
    cauliflower fennel beetroot kale turnips asparagus
""".split()
_PROTEINS = "chicken bacon tofu salmon beef prawns chorizo feta halloumi turkey lamb cod".split()
_HERBS = "basil thyme parsley coriander rosemary dill sage oregano mint tarragon chives".split()
_SPICES = "cumin paprika turmeric cinnamon nutmeg ginger cardamom chilli allspice saffron".split()
_FATS = phrases("olive oil|butter|sunflower oil|ghee|sesame oil|lard")
_LIQUIDS = phrases("vegetable stock|coconut milk|cream|white wine|chicken stock|yoghurt|cider")
_FRUITS = "apples pears cherries blueberries plums apricots raspberries bananas figs peaches".split()
_NUTS = "walnuts almonds hazelnuts pecans pistachios raisins chocolate-chips coconut-flakes".split()
_TOOLS = "saucepan skillet wok casserole frying-pan cast-iron-pot".split()
_VESSELS = phrases("baking tin|baking tray|deep dish|round mould|loaf tin")
_SIDES = phrases("""
    crusty bread|a green salad|pickled onions|steamed vegetables|flatbread|a spoonful of sour cream|
    lemon wedges
    """)

_SAVOURY_STEPS = lines("""
    - Peel and [finely chop|dice|mince] the onion{garlic_step}, then [slice|cube|shred] the {veg1} and the
      {veg2}.
    - Heat the {fat} in a large {tool} over a [medium|gentle|high] heat and [fry|soften|sweat] the onion for
      {t1} minutes until [golden|soft|translucent].
    - Add the {protein} and [brown|sear|cook] for {t2} minutes, [stirring often|turning once|until it
      colours at the edges].
    - Stir in the {spice1} and the {spice2} and [toast|cook] for a minute until [fragrant|it smells sweet].
    - Tip in the {base} and the {veg1}, pour over {ml} ml of the {liquid} and bring to the boil.
    - [Cover|Lower the heat] and simmer for {t3} minutes, adding the {veg2} for the last {t4} minutes.
    - Season with salt and [black|white] pepper, then [scatter over|fold in|top with] the [chopped|torn]
      {herb}.
    - Divide the {dish} between {serves} [bowls|plates] and serve [hot|at once|warm] with {side}.
    """)
_SWEET_STEPS = lines("""
    - Preheat the oven to {degrees} degrees and [line|grease|butter] a {vessel}.
    - Beat the butter with the sugar for {t1} minutes until [pale|fluffy|creamy], then whisk in the {eggs}
      eggs one at a time.
    - Sift the flour with the baking powder, the {spice1} and a pinch of salt, and fold it into the
      [batter|mixture] with the milk.
    - Core and [slice|chop|crush] the {fruit} and [toss|coat] the pieces in a spoonful of sugar.
    - Stir the {nuts} and half of the {fruit} into the batter; do not overmix.
    - Spoon the batter into the {vessel}, press the remaining {fruit} on top and sprinkle with {spice1}.
    - Bake for {t3} minutes until [risen|golden|a skewer comes out clean], then cool for {t2} minutes on a
      rack.
    - Dust the {dish} with icing sugar and cut into {serves} [portions|pieces]; serve with [custard|whipped
      cream|vanilla ice cream].
    """)
_NOTES = lines("""
    - Keep what is left of the {dish} for at most {days} days in the fridge; it [freezes well|tastes even
      better cold].
    - [No|Out of] {swap}? [Use|Try] {swap2} instead and [taste|season] as you go.
    - For a milder {dish}, halve the {spice1}; for a bolder one, double it.
    """)


def _picks(rng: random.Random, pools: dict[str, list[str]]) -> dict[str, object]:
    picked: dict[str, object] = {}
    for keys, pool in pools.items():
        words = (word.replace("-", " ") for word in rng.sample(pool, len(keys.split())))
        picked |= zip(keys.split(), words, strict=True)
    return picked


def _common(rng: random.Random) -> dict[str, object]:
    t1, t2, t3 = rng.randrange(3, 9), rng.randrange(4, 12), rng.randrange(12, 46)
    pools = {"spice1 spice2": _SPICES, "herb": _HERBS, "style": _STYLES}
    times = {"t1": t1, "t2": t2, "t3": t3, "t4": rng.randrange(3, 10), "minutes": 5 + t1 + t2 + t3}
    return _picks(rng, pools) | times | {"serves": rng.choice((2, 4, 6, 8)), "days": rng.randrange(2, 5)}


def _savoury(rng: random.Random) -> tuple[str, list[str], list[str], dict[str, object]]:
    """Title, ingredient lines, step templates and facts of a main dish."""
    pools = {
        "veg1 veg2 swap2": _VEGETABLES,
        "protein": _PROTEINS,
        "fat": _FATS,
        "liquid": _LIQUIDS,
        "tool": _TOOLS,
        "side": _SIDES,
    }
    facts = _common(rng) | _picks(rng, pools)
    facts["dish"], facts["base"], unit = rng.choice(_BASES)
    serves, cloves = int(str(facts["serves"])), rng.randrange(0, 4)
    facts |= {"ml": serves * rng.choice((100, 125, 150)), "swap": facts["veg2"]}
    facts["garlic_step"] = " and crush the garlic" if cloves else ""
    lines = [
        f"{serves * rng.choice((60, 75, 90))} {unit} {facts['base']}",
        f"{serves * 50} g {facts['protein']}",
    ]
    lines += [
        f"{serves // 2} onion{'s' if serves > 2 else ''}",
        f"{serves * 40} g {facts['veg1']}",
        f"{serves * 30} g {facts['veg2']}",
    ]
    lines += [f"{cloves} clove{'s' if cloves > 1 else ''} garlic"] if cloves else []
    lines += [f"{rng.randrange(1, 4)} tbsp {facts['fat']}", f"{facts['ml']} ml {facts['liquid']}"]
    lines += [f"{rng.randrange(1, 4)} tsp {facts[key]}" for key in ("spice1", "spice2")] + [
        f"a handful of {facts['herb']}"
    ]
    parts = [str(facts[key]) for key in ("protein", "veg1")]
    return sentence(f"{facts['style']} {listed(parts)} {facts['dish']}"), lines, _SAVOURY_STEPS, facts


def _sweet(rng: random.Random) -> tuple[str, list[str], list[str], dict[str, object]]:
    """Title, ingredient lines, step templates and facts of something baked."""
    facts = _common(rng) | _picks(
        rng, {"fruit swap2": _FRUITS, "nuts": _NUTS, "dish": _SWEETS, "vessel": _VESSELS}
    )
    serves = int(str(facts["serves"]))
    facts |= {"eggs": max(2, serves // 2), "degrees": rng.randrange(16, 23) * 10, "swap": facts["fruit"]}
    lines = [
        f"{serves * rng.choice((40, 50, 60))} g flour",
        f"{serves * 20} g sugar",
        f"{serves * 25} g butter",
    ]
    lines += [f"{facts['eggs']} eggs", f"{serves * 30} ml milk", f"{rng.randrange(1, 3)} tsp baking powder"]
    lines += [
        f"{rng.randrange(1, 4)} tsp {facts['spice1']}",
        f"{serves * 35} g {facts['fruit']}",
        f"{serves * 10} g {facts['nuts']}",
    ]
    return (
        sentence(f"{facts['style']} {facts['dish']} with {facts['fruit']} and {facts['nuts']}"),
        lines,
        _SWEET_STEPS,
        facts,
    )


def document(rng: random.Random) -> str:
    """A title, servings and time, the ingredients as a list, numbered steps and sometimes a note."""
    title, ingredients, templates, facts = rng.choice((_savoury, _sweet))(rng)
    steps = [f"{index}. {render(rng, template, facts)}" for index, template in enumerate(templates, 1)]
    head = render(
        rng,
        "Serves {serves} | Ready in {minutes} minutes",
        {key: facts[key] for key in ("serves", "minutes")},
    )
    parts = [
        f"# {title}",
        head,
        "## Ingredients",
        "\n".join(f"- {line}" for line in ingredients),
        "## Method",
        "\n".join(steps),
    ]
    if rng.random() < 0.6:
        parts += ["## Notes", render(rng, rng.choice(_NOTES), facts)]
    return "\n\n".join(parts) + "\n"
