"""Preference rows of every form, and mutations of them: keys lost, doubled, or filled with what is out of place."""

import copy
import random

USER = {"role": "user", "content": "Which way is north?"}
CALL = {"type": "function", "function": {"name": "compass", "arguments": '{"at": "sea"}'}}
TOOL = {"type": "function", "function": {"name": "compass", "parameters": {"type": "object", "properties": {}}}}


def said(text, **extra):
    """Returns a turn of the assistant."""
    return {"role": "assistant", "content": text, **extra}


ROWS = [
    {"prompt": "Which way?", "chosen": "North.", "rejected": "Down.", "score_chosen": 3.0, "score_rejected": 1.0},
    {"prompt": [USER], "chosen": [said("North.")], "rejected": [said("Down.")], "tools": [TOOL], "system": "Be brief."},
    {"chosen": [USER, said("North.")], "rejected": [USER, said("Down.")], "messages": [USER, said("North.")]},
    {"chosen": "\n\nHuman: Way?\n\nAssistant: North.", "rejected": "\n\nHuman: Way?\n\nAssistant: Down."},
    {"instruction": "Point", "input": "to the north", "chosen": "There.", "rejected": "No.",
     "history": [["Hi", "Hello"]]},
    {"conversations": [{"from": "human", "value": "Way?"}, {"from": "function_call", "value": '{"name": "compass"}'},
                       {"from": "observation", "value": "N"}],
     "chosen": {"from": "gpt", "value": "North."}, "rejected": {"from": "gpt", "value": "Down."}, "tools": "[]"},
    {"messages": [USER, said(None, tool_calls=[CALL]), {"role": "tool", "content": "N", "tool_call_id": "1"}],
     "chosen": said("North.", reasoning="It says N."), "rejected": said("Down.", thinking="It fell.", weight=0)},
    {"context": [USER], "completions": [{"rank": 1, "completion": [said("Down.")]},
                                        {"rank": 0, "completion": [said("North.")]}]},
    {"context": [USER], "response1": "Down.", "response2": "North.", "overall_preference": 2},
    {"prompt": "Way?", "chosen_response": "North.", "rejected_response": "Down.", "margin": 0.5},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Way?"}]}], "chosen": "North.", "rejected": "S"},
]  # fmt: skip
JUNK = (
    None, True, 0, -1, 3.5, float("nan"), "", " ", "x", "a b", "[", "{}", "[]", "\ud800", "\ufdd0", [], {}, [[]],
    [None], [1], ["a"], [["a"]], [["a", "b"]], {"role": "user"}, {"role": 3, "content": []},
    {"from": "gpt", "value": "so"},
    [{"type": "image"}], [{"rank": "x"}], "\n\nHuman: a", "\n\nHuman: a\n\nAssistant:", "developer", "wizard",
)  # fmt: skip


def mutated_row(random_numbers: random.Random) -> object:
    """Returns a row with up to three mutations, some of which leave it a pair."""
    return mutate(copy.deepcopy(random_numbers.choice(ROWS)), random_numbers)


def mutate(row: dict, random_numbers: random.Random) -> object:
    """Returns `row` with up to three mutations, in place."""
    for _ in range(random_numbers.randrange(4)):
        place = _some_place(row, random_numbers)
        if place is None:
            return row
        holder, key = place
        action = random_numbers.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1:
            holder[key] = copy.deepcopy(random_numbers.choice(JUNK))
        elif action == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            donor = random_numbers.choice(ROWS)
            name = random_numbers.choice(sorted(donor))
            if isinstance(holder, dict):
                holder[name] = copy.deepcopy(donor[name])
            else:
                holder[key] = copy.deepcopy(donor[name])
    return row


def _some_place(value, random_numbers):
    holders = []

    def walk(item):
        if isinstance(item, (dict, list)):
            holders.extend((item, key) for key in (item if isinstance(item, dict) else range(len(item))))
            for part in item.values() if isinstance(item, dict) else item:
                walk(part)

    walk(value)
    return random_numbers.choice(holders) if holders else None
