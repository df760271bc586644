"""Decides which variables of a chat template tell it how long a model may think, and how long it may answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from splitfuse.errors import InvalidRequestError, any_of, nearest

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Values of reasoning_effort."""
VERBOSITIES = ("low", "medium", "high")
"""Values of verbosity."""
_NO_THOUGHT = ("none", "minimal")
SWITCHES = ("enable_thinking", "thinking")
"""Names by which templates know whether the model should think."""
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of templates that are no switches."""


def template_variables(
    given: Mapping[str, Any] | None,
    *,
    effort: str | None,
    verbosity: str | None,
    known: Collection[str],
    thinks: bool,
) -> Mapping[str, Any] | None:
    """Return the `given` variables, with those that ask for an effort and a verbosity. The template reads the `known`
    ones; `thinks` says that its model writes thoughts.

    Raises InvalidRequestError, naming the parameter, for what the template cannot tell the model.

    >>> template_variables({}, effort="none", verbosity=None, known={"enable_thinking"}, thinks=True)
    {'enable_thinking': False}
    """
    asked: dict[str, tuple[str, Any]] = {}
    if effort is not None:
        _check("reasoning_effort", effort, EFFORTS)
        if "reasoning_effort" in known:
            asked["reasoning_effort"] = "reasoning_effort", effort
        if effort in _NO_THOUGHT:
            asked |= {name: ("reasoning_effort", False) for name in SWITCHES if name in known}
        if not asked and (thinks or effort not in _NO_THOUGHT):
            _refuse_effort(effort, thinks, next((name for name in SWITCHES if name in known), None))
    if verbosity is not None:
        _check("verbosity", verbosity, VERBOSITIES)
        if "verbosity" in known:
            asked["verbosity"] = "verbosity", verbosity
        elif verbosity != "medium":
            problem = 'the model\'s chat template does not know it; leave it out or send "medium"'
            _refuse("verbosity", f"{verbosity!r} is not supported: {problem}")
    variables = dict(given or {})
    for name, (parameter, value) in asked.items():
        if variables.setdefault(name, value) != value:
            _refuse(parameter, f"and chat_template_kwargs.{name} contradict each other: leave one out")
    return variables or None


def check_variables(given: Mapping[str, Any] | None, known: Collection[str], *, thinks: bool) -> None:
    """Raise InvalidRequestError for a variable of a request that is no switch of the template, which reads the `known`
    ones; that a model which never thinks should not think is granted.
    """
    for name, value in (given or {}).items():
        if name in _RESERVED:
            problem = "is not one of the chat template's own variables: leave it out"
        elif name not in known and not (name in SWITCHES and value is False and not thinks):
            near = nearest(name, set(known).difference(_RESERVED)) or ": leave it out"
            problem = f"is not read by the model's chat template{near}"
        else:
            continue
        raise InvalidRequestError(f"chat_template_kwargs.{name:.80} {problem}", parameter="chat_template_kwargs")


def asks_for_no_thought(variables: Mapping[str, Any] | None, effort: str | None) -> bool:
    """Return whether a request wants an answer without a thought."""
    return effort in _NO_THOUGHT or any((variables or {}).get(name) is False for name in SWITCHES)


def _refuse_effort(effort: str, thinks: bool, switch: str | None) -> NoReturn:
    if not thinks:
        problem = 'the model\'s chat template has no thoughts; leave it out or send "none"'
    elif switch is None:
        problem = "the model's chat template does not let a request say how long to think; leave it out"
    else:
        advice = f'leave it out, or send "none" or chat_template_kwargs {{"{switch}": true}}'
        problem = f"the model's chat template only knows whether to think; {advice}"
    _refuse("reasoning_effort", f"{effort!r} is not supported: {problem}")


def _check(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        _refuse(name, f"must be {any_of(valid)}, not {value!r:.80}")


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequestError(f"{name} {problem}", parameter=name)
