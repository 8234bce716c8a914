"""How long a training recipe's rows are, where its data is here: as Axolotl itself reads and cuts them.

    python -m harness.costs.rows < QUESTIONS.json    [{"recipe": …}] → [{"rows", "prompt", "answer", "context", "hard"}]

`rows` is how many there are; `prompt`, `answer` and `context` are tokens of the longest: what carries no loss, what
does, and what an on-policy teacher reads. `hard` is the share of answer tokens that `axolotl tah-label` found hard,
null where it was not asked. Knows Axolotl's data sets. In a process of its own, as Axolotl's imports take their time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from harness.costs.aside import answer_all


def measured(recipe: dict[str, Any]) -> dict[str, Any]:
    """The longest rows of a resolved recipe whose data sets are files of this machine."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yml"
        here = {"dataset_prepared_path": f"{folder}/prepared", "output_dir": f"{folder}/out"}
        file.write_text(yaml.safe_dump({**recipe, **here}))
        rows: Any = load_datasets(cfg=load_cfg(str(file))).train_dataset
        if "teacher_input_ids" in rows.column_names:
            new = int(recipe["on_policy_kl"].get("max_new_tokens") or 512)
            prompt, context = (max(map(len, rows[name])) for name in ("input_ids", "teacher_input_ids"))
            return {"rows": len(rows), "prompt": prompt, "answer": new, "context": context, "hard": None}
        widest = max(map(len, rows["input_ids"]))
        answer = max(sum(label != -100 for label in labels) for labels in rows["labels"])
        hard = hard_share(Path(recipe.get("dataset_prepared_path") or "last_run_prepared"), rows["labels"])
        return {"rows": len(rows), "prompt": widest - answer, "answer": answer, "context": 0, "hard": hard}


def hard_share(prepared: Path, labels: Any) -> float | None:
    """What labels of Think-at-Hard that are kept for these rows say; None where there are none."""
    from safetensors.numpy import load_file

    tokens, answers = sum(map(len, labels)), sum(label != -100 for row in labels for label in row)
    for file in (prepared / "tah_labels").glob("*.safetensors"):
        hard = load_file(file)["hard"]
        if len(hard) == tokens and answers:
            return float(hard.sum()) / answers
    return None


if __name__ == "__main__":
    answer_all(lambda asked: measured(asked["recipe"]))
