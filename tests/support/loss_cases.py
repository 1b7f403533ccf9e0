"""The losses that the layouts are compared on, and the groups of their steps."""

from __future__ import annotations

from typing import Any

# id: (configuration, what a group is made of)
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"name": "sft"}, "single"),
    "poft": ({"name": "poft"}, "single"),
    "dpo": ({"name": "dpo"}, "preference"),
    "ipo": ({"name": "dpo", "variant": "ipo"}, "preference"),
    "simpo": ({"name": "simpo"}, "preference"),
    "orpo": ({"name": "orpo", "lambda": 0.4}, "preference"),
    "margin": ({"name": "tests.support.my_losses:margin", "margin": 0.7}, "preference"),
    "focal": ({"name": "tests.support.my_losses:focal", "gamma": 2.0, "pull": 0.3}, "single"),
    "epa": ({"name": "epa"}, "contrast"),
    "grpo": ({"name": "grpo", "beta": 0.3}, "samples"),
    "dr_grpo": ({"name": "grpo", "variant": "dr_grpo", "max_response_length": 12, "beta": 0.3}, "samples"),
    "dapo": ({"name": "grpo", "variant": "dapo"}, "samples"),
    "rloo": ({"name": "rloo"}, "samples"),
    "gvpo": ({"name": "gvpo", "beta": 0.2}, "samples"),
}
USERS = ("margin", "focal")  # those of a user's own
OLD = ("grpo", "dr_grpo", "dapo", "rloo")
COUPLED = ("dpo", "ipo", "simpo", "orpo", "margin", "epa", "gvpo")
KINDS = {
    "single": [["response"]] * 7,  # an odd number of sequences: two data ranks need a dummy where each is alone
    "preference": [["chosen", "rejected"]] * 3 + [["rejected", "chosen"]],
    "contrast": [
        ["positive", "strong"],
        ["positive", "strong", "weak"],
        ["strong", "positive", "strong", "weak", "weak"],
    ],
    "samples": [["response"] * k for k in (2, 5, 3, 4)],
}
