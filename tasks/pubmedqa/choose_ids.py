"""How the thirty test ids and the fifteen training ids of PubMedQA were chosen.

    python tasks/pubmedqa/choose_ids.py test_ground_truth.json pqa_labeled_ids.txt

writes `test_ids.txt` and `prompt_ids.txt` beside this file. The first argument is the official test split, as the
PubMedQA repository has it ({"PubMed id": "yes"|"no"|"maybe"}, 500 rows); the second lists the 1,000 ids of
`pqa_labeled`. Knows the rule; leaves loading and wording to `utils.py`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


def choose_test_ids(gold: Mapping[str, str], size: int = 30) -> list[str]:
    """Choose test ids in the proportions of the official split's decisions.

    Each decision gets its share of `size`, rounded by largest remainder (17 yes, 10 no, 3 maybe of 30), and gives the
    ids with the smallest SHA-256 of the id's decimal digits.

    Args:
        gold: The official test split, PubMed id to decision.
        size: How many ids.

    Returns:
        The ids, ordered by hash over all decisions.
    """
    by_decision: dict[str, list[str]] = {}
    for pubmed_id in sorted(gold, key=_hash):
        by_decision.setdefault(gold[pubmed_id], []).append(pubmed_id)
    share = {decision: divmod(size * len(ids), len(gold)) for decision, ids in by_decision.items()}
    missing = size - sum(whole for whole, _ in share.values())
    rounded_up = sorted(share, key=lambda decision: (-share[decision][1], decision))[:missing]
    chosen = [
        pubmed_id
        for decision, ids in by_decision.items()
        for pubmed_id in ids[: share[decision][0] + (decision in rounded_up)]
    ]
    return sorted(chosen, key=_hash)


def choose_prompt_ids(labeled: Iterable[str], gold: Mapping[str, str], size: int = 15) -> list[str]:
    """Choose training ids outside the official test split; no decision is looked at, labels are the model's own.

    Args:
        labeled: All ids of `pqa_labeled`.
        gold: The official test split, whose ids are left out.
        size: How many ids.

    Returns:
        The ids with the smallest SHA-256, in its order.
    """
    return sorted(set(labeled) - set(gold), key=_hash)[:size]


def _hash(pubmed_id: str) -> str:
    return hashlib.sha256(pubmed_id.encode()).hexdigest()


if __name__ == "__main__":
    official = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    everything = Path(sys.argv[2]).read_text(encoding="utf-8").split()
    here = Path(__file__).parent
    (here / "test_ids.txt").write_text("\n".join(choose_test_ids(official)) + "\n", encoding="utf-8")
    (here / "prompt_ids.txt").write_text("\n".join(choose_prompt_ids(everything, official)) + "\n", encoding="utf-8")
