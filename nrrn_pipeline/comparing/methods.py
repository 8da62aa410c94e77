"""Which methods are compared, as users name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nrrn_pipeline.errors import InputError
from nrrn_pipeline.filters import FILTERS
from nrrn_pipeline.network import KINDS
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.report.page import INPUT, REFERENCE, REMOVED


@dataclass(frozen=True)
class Candidate:
    """One method: its name in the table, and its weights, or the filter that it is."""

    name: str
    weights: str | None = None

    @property
    def method(self) -> str | None:
        """What Options.method is to name."""
        return None if self.weights else self.name


def candidates(methods: str, weights: Sequence[str]) -> list[Candidate]:
    """The methods of a text such as "nrrn,bm3d-avg,mine=w.safetensors".

    Each is a filter's name, or NAME=FILE with weights; or a kind of network, if one of `weights` alone holds that.
    Raises InputError for any other.
    """
    kinds: dict[str, list[str]] = {}
    for path in weights:
        kinds.setdefault(describe_weights(path).kind, []).append(path)
    found = []
    unused = {path for paths in kinds.values() for path in paths}
    for text in filter(None, (part.strip() for part in methods.split(","))):
        name, given, path = text.partition("=")
        if not given and name in KINDS:
            if len(kinds.get(name, [])) != 1:
                raise InputError(
                    f"method {name} needs its weights: give one file of them with --weights, or write {name}=FILE"
                )
            path = kinds[name][0]
            unused.discard(path)
        elif not given and name not in FILTERS:
            known = ", ".join((*KINDS, *FILTERS))
            raise InputError(f"method {name!r} is unknown: use {known}, or NAME=FILE with weights")
        if not re.fullmatch(r"\w[\w.+-]{0,63}", name) or (given and not path):
            raise InputError(f"method {text!r} cannot be: write NAME=FILE, with a name of letters, digits, . _ -")
        found.append(Candidate(name, path or None))
    names = [each.name.casefold() for each in found]  # they become folders, and not all disks tell cases apart
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"method {min(twice)} is there twice: write NAME=FILE with another name for one of them")
    if taken := {INPUT, REFERENCE, REMOVED} & {*names}:
        raise InputError(f"method {min(taken)} cannot be: the name stands for something else; use another")
    if not names:
        raise InputError(f"methods {methods!r} name none to compare: give some, such as gaussian-avg,nlm-avg")
    if unused:
        raise InputError(f"weights {min(unused)} are of no method: name their kind among --methods, or leave them out")
    return found
