"""JSON records with nested fields: identifiers, sums, counts and time spans inside a record agree."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from federated.data.wikimix.words import FIRST_NAMES, invented_name

_STATUS = "active pending archived suspended draft verified expired locked".split()
_CURRENCIES = "EUR USD GBP CHF SEK JPY CAD".split()
_SKUS = """
    cable router monitor keyboard adapter charger webcam printer speaker headset tablet scanner switch modem
""".split()
_METRICS = "temperature humidity pressure voltage latency throughput vibration luminosity".split()
_UNITS = {
    "temperature": "celsius", "humidity": "percent", "pressure": "hectopascal", "voltage": "volt",
    "latency": "millisecond", "throughput": "megabit", "vibration": "hertz", "luminosity": "lux",
}  # fmt: skip
_ROLES = "admin editor viewer auditor owner guest operator developer".split()
_SCOPES = """
    read:orders write:orders read:users write:users read:logs delete:logs manage:billing export:reports
""".split()
_SERVICES = "gateway scheduler indexer mailer billing cache queue storage".split()
_LEVELS = "debug info warning error critical".split()
_MODELS = "sedan van tractor scooter truck wagon tram ferry".split()
_FUELS = "diesel electric hybrid hydrogen petrol".split()
_PORTS = "HAM ROT ANT OSL GDN LIS BCN TRS".split()


def _date(rng: random.Random) -> str:
    return f"20{rng.randrange(10, 26)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"


def _code(rng: random.Random, prefix: str) -> str:
    return f"{prefix}-{rng.randrange(16**4):04x}-{rng.randrange(1000):03d}"


def _person(rng: random.Random) -> dict[str, object]:
    first, last = rng.choice(FIRST_NAMES), invented_name(rng)
    domain = rng.choice(("example.org", "example.com", "mail.example.net"))
    return {"first_name": first, "last_name": last, "email": f"{first}.{last}@{domain}".lower()}


def _order(rng: random.Random) -> dict[str, object]:
    lines = []
    for sku in rng.sample(_SKUS, rng.randrange(2, 5)):
        quantity, price = rng.randrange(1, 9), rng.randrange(5, 250)
        lines.append({"sku": sku, "quantity": quantity, "unit_price": price, "line_total": quantity * price})
    subtotal = sum(int(str(line["line_total"])) for line in lines)
    shipping = rng.choice((0, 5, 9, 15))
    return {
        "order_id": _code(rng, "ord"),
        "created_at": _date(rng),
        "customer": _person(rng),
        "currency": rng.choice(_CURRENCIES),
        "items": lines,
        "item_count": len(lines),
        "subtotal": subtotal,
        "shipping": shipping,
        "total": subtotal + shipping,
        "paid": rng.random() < 0.7,
    }


def _sensor(rng: random.Random) -> dict[str, object]:
    metric = rng.choice(_METRICS)
    start, step = rng.randrange(5, 60), rng.randrange(1, 4)
    values = [start]
    for _ in range(rng.randrange(4, 8)):
        values.append(values[-1] + rng.choice((-step, 0, step)))
    hour = rng.randrange(0, 15)
    readings = [{"time": f"{hour + index:02d}:00", "value": value} for index, value in enumerate(values)]
    return {
        "device": {
            "id": _code(rng, "sen"),
            "firmware": f"{rng.randrange(1, 5)}.{rng.randrange(10)}.{rng.randrange(10)}",
        },
        "location": {
            "latitude": round(rng.uniform(-80, 80), 2),
            "longitude": round(rng.uniform(-170, 170), 2),
        },
        "metric": metric,
        "unit": _UNITS[metric],
        "readings": readings,
        "summary": {"count": len(values), "min": min(values), "max": max(values)},
        "alert": max(values) > start + 2 * step,
    }


def _account(rng: random.Random) -> dict[str, object]:
    person = _person(rng)
    return {
        "user_id": rng.randrange(1000, 99999),
        "username": str(person["email"]).split("@")[0],
        "profile": person,
        "role": rng.choice(_ROLES),
        "scopes": sorted(rng.sample(_SCOPES, rng.randrange(2, 5))),
        "status": rng.choice(_STATUS),
        "last_login": rng.choice((_date(rng), None)),
        "settings": {
            "newsletter": rng.random() < 0.5,
            "two_factor": rng.random() < 0.5,
            "language": rng.choice(("en", "de", "fr", "pl", "pt")),
        },
        "address": {"city": invented_name(rng), "postcode": str(rng.randrange(10000, 99999))},
    }


def _log(rng: random.Random) -> dict[str, object]:
    service, host = rng.choice(_SERVICES), f"node-{rng.randrange(1, 40)}"
    events, clock = [], rng.randrange(0, 400)
    for _ in range(rng.randrange(3, 6)):
        clock += rng.randrange(1, 90)
        level = rng.choice(_LEVELS)
        events.append(
            {"offset_ms": clock, "level": level, "service": service, "retry": level in ("error", "critical")}
        )
    return {
        "trace": _code(rng, "trc"),
        "host": host,
        "service": service,
        "events": events,
        "errors": sum(bool(event["retry"]) for event in events),
        "duration_ms": clock,
    }


def _vehicle(rng: random.Random) -> dict[str, object]:
    origin, target = rng.sample(_PORTS, 2)
    legs, start = [], rng.randrange(1000, 90000)
    odometer = start
    for _ in range(rng.randrange(2, 5)):
        distance = rng.randrange(10, 400)
        legs.append({"from": odometer, "to": odometer + distance, "distance": distance})
        odometer += distance
    return {
        "vehicle": {
            "plate": _code(rng, origin.lower()),
            "type": rng.choice(_MODELS),
            "fuel": rng.choice(_FUELS),
        },
        "route": {"origin": origin, "destination": target, "legs": legs},
        "odometer": {"start": start, "end": odometer},
        "distance": odometer - start,
        "driver": _person(rng),
        "status": rng.choice(_STATUS),
    }


_KINDS: tuple[Callable[[random.Random], dict[str, object]], ...] = (_order, _sensor, _account, _log, _vehicle)


def document(rng: random.Random) -> str:
    """One JSON object, indented by one or two spaces, 400 to 1,500 characters."""
    return json.dumps(rng.choice(_KINDS)(rng), indent=rng.choice((1, 2)))
