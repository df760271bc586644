"""Asks a chat model typed questions about a state, as the System One API has them, and reads its answers.

A question has a few options, each with a label of one token; the model's turn begins, and the probabilities of the
labels as its first token are those of the options. Nothing is generated.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from splitfuse.errors import InvalidRequestError, any_of, brief_json

LETTERS = tuple(string.ascii_uppercase)
"""Labels of options, in their order."""
YES_NO = ("Yes", "No")
"""Labels of the two options of a noul question, in a vocabulary that has them."""


KINDS = ("choice", "score", "noul")
"""Types of questions."""


@dataclass(frozen=True)
class DecisionSettings:
    """Holds what the decision.json of a decision model says, by the types of questions."""

    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    temperature: Mapping[str, float] = field(default_factory=dict)
    """Number by which the log-probabilities of labels are divided; left out: 1."""
    problem: str = ""
    """What is wrong with the file, or not supported of it: then the model decides nothing."""

    @classmethod
    def of(cls, values: Mapping[str, Any], *, has_template: bool) -> DecisionSettings:
        """Return the settings in the object of a decision.json, and whether a decision_template.jinja is next to it."""
        neutral = {"noul_options": ["true", "false"], "sanitize_control_tokens": True}
        labels, temperature = values.get("labels") or {}, values.get("temperature") or {}
        if has_template or values.get("chat_template"):
            return cls(problem="a template of its own for questions, which is not supported")
        for name, value in values.items():
            if name not in ("labels", "temperature") and value not in (None, neutral.get(name)):
                return cls(problem=f"{name} {brief_json(value)}, which is not supported")
        if not _maps_kinds(labels, _are_labels):
            return cls(problem=f"labels {brief_json(labels)}, which must be a list of texts for types of questions")
        if not _maps_kinds(temperature, _is_temperature):
            return cls(problem=f"temperature {brief_json(temperature)}, which must be numbers above 0 for these types")
        return cls({kind: tuple(each) for kind, each in labels.items()}, temperature)

    def check(self) -> None:
        """Raise InvalidRequestError if the model decides nothing."""
        if self.problem:
            message = f"the model's decision.json has {self.problem}: remove the file, or use another model"
            raise InvalidRequestError(message)


USUAL = DecisionSettings()
"""Settings of a model without a decision.json."""


def _maps_kinds(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and set(value) <= set(KINDS) and all(map(is_valid, value.values()))


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(label, str) and label for label in value)


def _is_temperature(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True)
class Question:
    """Holds one question: its options in order, and what is said of each.

    The options of a choice are the keys of its criteria; those of a score the numbers of its levels, from 0; those of a
    noul, which asks whether something is true, are `true` and `false`.
    """

    kind: Literal["choice", "score", "noul"]
    instructions: str
    options: tuple[str, ...]
    descriptions: tuple[Any, ...]

    @classmethod
    def parse(
        cls,
        kind: Literal["choice", "score", "noul"],
        instructions: Any,
        criteria: Any,
        where: str,
        settings: DecisionSettings = USUAL,
    ) -> Question:
        """Return the question of a request. Raises InvalidRequestError, naming the place, for criteria that do not go
        with its type, and for more options than a type has labels.
        """
        if kind == "noul":
            named = {} if criteria is None else criteria
            if not isinstance(named, dict) or not set(named) <= {"true", "false"}:
                raise _refused(where, 'an object with "true" or "false", or left out', criteria)
            options = {option: named.get(option) for option in ("true", "false")}
        elif kind == "choice":
            if not isinstance(criteria, dict) or not criteria:
                raise _refused(where, "an object with a description, or null, for each option", criteria)
            options = criteria
        else:
            if not isinstance(criteria, list) or not criteria:
                raise _refused(where, "an array with a description of each level, the lowest first", criteria)
            options = {str(level): description for level, description in enumerate(criteria)}
        if len(options) > (most := len(settings.labels.get(kind, LETTERS))):
            raise InvalidRequestError(
                f"{where}.criteria has {len(options)} options; at most {most} are distinguished",
                parameter=f"{where}.criteria",
            )
        return cls(kind, as_text(instructions), tuple(options), tuple(options.values()))

    def labels(self, settings: DecisionSettings = USUAL, *, has_yes_no: bool) -> tuple[str, ...]:
        """Return a label for each option."""
        usual = YES_NO if self.kind == "noul" and has_yes_no else LETTERS
        return settings.labels.get(self.kind, usual)[: len(self.options)]

    def prompt(self, state: str, labels: Sequence[str]) -> str:
        """Return the user's turn that asks the question. It begins with the state, which questions share."""
        lines = [state, ""]
        if self.instructions:
            lines.append(self.instructions)
        for label, option, description in zip(labels, self.options, self.descriptions, strict=True):
            said = as_text(description)
            match self.kind:
                case "choice":
                    lines.append(f"{label}. {option}: {said}" if said else f"{label}. {option}")
                case "score":
                    lines.append(f"{label}. {said}")
                case "noul" if said or tuple(labels) != YES_NO:
                    lines.append(f"{label}. {said or {'true': 'Yes', 'false': 'No'}[option]}")
        lines.append(f"Reply with {any_of(labels)}, and nothing else.")
        return "\n".join(lines)

    def answer(self, probabilities: Sequence[float]) -> dict[str, Any]:
        """Return the answer, from the probabilities of the options."""
        count = len(self.options)
        best = max(range(count), key=probabilities.__getitem__)
        named = dict(zip(self.options, probabilities, strict=True))
        if self.kind == "noul":
            return {"type": "noul", "noul": named["true"]}
        if self.kind == "choice":
            confidence = _above(probabilities[best], 1 / count)
            return {"type": "choice", "choice": self.options[best], "confidence": confidence, "probabilities": named}
        distance = sum(share * abs(level - best) for level, share in enumerate(probabilities))
        uniform = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
        return {
            "type": "score",
            "score": sum(level * share for level, share in enumerate(probabilities)),
            "legend": dict(zip(self.options, self.descriptions, strict=True)),
            "confidence": max(0.0, 1 - distance / uniform) if count > 1 else 1.0,
            "probabilities": named,
        }


def as_text(content: Any) -> str:
    """Return a text as it is, nothing for None, and anything else as JSON."""
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _above(share: float, uniform: float) -> float:
    """Return how far a share lies between that of a blind guess, 0, and certainty, 1."""
    return 1.0 if uniform == 1 else max(0.0, (share - uniform) / (1 - uniform))


def _refused(where: str, valid: str, criteria: Any) -> InvalidRequestError:
    name = f"{where}.criteria"
    return InvalidRequestError(f"{name} must be {valid}, not {brief_json(criteria)}", parameter=name)
