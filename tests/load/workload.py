"""What the clients of a load run ask: the same over HTTP and of the engine itself."""

from __future__ import annotations

import random

# fmt: off
_WORDS = (
    "river", "stone", "winter", "lamp", "garden", "copper", "window", "engine", "harbour", "violin", "letter",
    "orchard", "mirror", "bridge", "candle", "forest", "market", "pencil", "island", "thunder", "blanket",
    "compass", "feather", "kettle", "ladder", "meadow", "needle", "oyster", "pepper", "quarry", "ribbon",
    "saddle", "tunnel", "umbrella", "valley", "wagon", "anchor", "basket", "cellar", "desert", "emerald",
    "fountain", "glacier", "hammer", "insect", "jungle", "kitchen",
)
# fmt: on


def messages(client: int, number: int, num_words: int) -> list[dict[str, str]]:
    """The `number`-th question of a client: no two are the same, so that no cached prefix answers for another."""
    asked = f"Story {client}.{number}: tell a long story in which these occur: {words(f'{client} {number}', num_words)}"
    return [{"role": "user", "content": asked}]


def words(seed: str, num_words: int) -> str:
    """So many words; fewer of one seed are the first of more."""
    rng = random.Random(seed)
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))
