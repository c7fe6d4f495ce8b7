"""Local files of the five tasks: records in the columns of the published sets, made up from word lists."""

import json
import random
from pathlib import Path

ITEMS = 12
_PEOPLE = ("She", "A boy", "The old man", "Nobody", "The cook", "A teacher")
_DEEDS = ("opens", "paints", "forgets", "cuts", "washes", "lifts")
_THINGS = ("the door", "the river stones", "a green house", "the answer", "a loaf of bread", "the lamp")
_WAYS = ("at night", "in the garden", "with a sharp knife", "before lunch", "by hand", "with warm water")
_KEYS = {"arc_easy": "ABCD", "arc_challenge": "1234", "openbookqa": "ABCD"}


def _sentence(rng: random.Random) -> str:
    return f"{rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} {rng.choice(_THINGS)} {rng.choice(_WAYS)}"


def _piqa(rng: random.Random, number: int) -> dict[str, object]:
    deed, thing = rng.choice(_DEEDS), rng.choice(_THINGS)
    first, second = rng.sample(_WAYS, 2)
    return {
        "goal": f"How does one who {deed} {thing} begin?",
        "sol1": f"One {deed} {thing} {first}.",
        "sol2": f"One {deed} {thing} {second}, and waits.",
        "label": number % 2,
    }


def _hellaswag(rng: random.Random, number: int) -> dict[str, object]:
    return {
        "ind": number,
        "activity_label": "Washing dishes",
        "ctx_a": f"[header] How to wash [title] {_sentence(rng)}.",
        "ctx_b": "then  she" if number % 3 else "",
        "endings": [f"{rng.choice(_DEEDS)} {rng.choice(_THINGS)} [step] {way}." for way in _WAYS[:4]],
        "label": str(number % 4),
    }


def _question(rng: random.Random, number: int, keys: str) -> dict[str, object]:
    texts = rng.sample(_THINGS, 4)
    if number % 3 == 0:
        texts = list("xyzw")  # answers of one token share all of their context
    return {"choices": {"text": texts, "label": list(keys)}, "answerKey": keys[number % 4]}


def write_task_files(folder: Path, seed: int = 0) -> Path:
    """One file for each task, of a dozen records."""
    rng = random.Random(seed)
    records: dict[str, list[dict[str, object]]] = {
        "piqa": [_piqa(rng, number) for number in range(ITEMS)],
        "hellaswag": [_hellaswag(rng, number) for number in range(ITEMS)],
    }
    for task, keys in _KEYS.items():
        stem = "question_stem" if task == "openbookqa" else "question"
        records[task] = [
            {"id": str(number), stem: f"{_sentence(rng)}. What was it?", **_question(rng, number, keys)}
            for number in range(ITEMS)
        ]
    folder.mkdir(exist_ok=True)
    for task, rows in records.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text)
    return folder
