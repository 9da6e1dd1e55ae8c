"""Calls of tools in a message of OpenAI's chat protocol, whole or streamed in pieces."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from distill_datasets.conversations import Call, read_calls


def calls_of(message: Mapping[str, Any]) -> list[Call | str]:
    """What a message calls; a call that can't be read is the JSON text that came."""
    return [_read(one) for one in _listed(message)]


def _listed(message: Mapping[str, Any]) -> list[Any]:
    # `function_call` is how the protocol called one tool before it had several.
    found = message.get("tool_calls") or message.get("function_call") or []
    return found if isinstance(found, list) else [found]


def _read(one: Any) -> Call | str:
    try:
        return read_calls([one])[0]
    except ValueError:
        return json.dumps(one, ensure_ascii=False)


class CallPieces:
    """The calls of a streamed message: names and arguments come in pieces, calls side by side."""

    def __init__(self) -> None:
        """None so far."""
        self._calls: list[dict[str, Any]] = []
        self._by_index: dict[Any, dict[str, Any]] = {}

    def add(self, delta: Mapping[str, Any]) -> bool:
        """Join a part of a message; whether it has any call."""
        pieces = _listed(delta)
        for piece in pieces:
            said = piece.get("function", piece)
            self._join(self._call(piece, said), piece, said)
        return bool(pieces)

    def _call(self, piece: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
        """The call that a piece continues: the one of its index, unless it names another id.

        Servers that give no index, or the same to all, send each call whole.
        """
        index, id = piece.get("index"), piece.get("id")
        call = self._by_index.get(index)
        begins = call is None or (id and call["id"] and id != call["id"])
        if index is None and id is None and said.get("name") and call and call["arguments"]:
            begins = True
        if call is None or begins:
            call = {"id": None, "name": "", "arguments": []}
            self._calls.append(call)
            self._by_index[index] = call
        return call

    @staticmethod
    def _join(call: dict[str, Any], piece: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        call["id"] = call["id"] or piece.get("id")
        name = said.get("name") or ""
        call["name"] += "" if name == call["name"] else name  # some repeat it in every piece
        if arguments := said.get("arguments"):
            call["arguments"].append(arguments)

    @property
    def joined(self) -> list[dict[str, Any]]:
        """Calls as a message that wasn't streamed has them."""
        return [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": _whole(call["arguments"])},
            }
            for call in self._calls
        ]


def _whole(pieces: Iterable[Any]) -> Any:
    """Arguments as text, or the object that came whole."""
    found = list(pieces)
    return "".join(found) if all(isinstance(one, str) for one in found) else found[-1]
