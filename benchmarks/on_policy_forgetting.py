"""Behaviour lost by fine-tuning on something new, won back from the model's own earlier self.

    python benchmarks/on_policy_forgetting.py [--seeds 3 --out runs/forgetting] [--record]

1. The instruct checkpoint is fine-tuned on `mini_qa` alone (instruct_distill.yml): `mini_qa` rises, `mini_math` falls.
2. It is distilled on-policy with the checkpoint before step 1 as its teacher, on `mini_math`'s prompts: no answer of
   anybody else's is read (Thinking Machines Lab, 2025).

Bounds: `mini_math` within 2 points of where it was, `mini_qa` keeps 90 % of its gain. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mini_lab import INSTRUCT, MERGED, Lab, mean_and_interval, start_runner
from record import Recorder

TASKS = ("mini_math", "mini_qa")
QUESTIONS = 2000  # of the tasks' own 200, one that turns either way is half a point, and many are near a tie
FORGET = {"max_steps": 80, "num_epochs": 1000, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 20}
RECOVER = {"max_steps": 100, "num_epochs": 1000, "learning_rate": 5e-4, "save_strategy": "no", "logging_steps": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--updates", type=int, help="of either training, to see that it works")
    recorder = Recorder(parser)
    asked = parser.parse_args()
    fewer = {"max_steps": asked.updates} if asked.updates else {}
    rows = []
    with start_runner(asked.out) as runner:
        lab = Lab(asked.out, runner)
        before = {task: lab.score(INSTRUCT, task, QUESTIONS) for task in TASKS}
        for seed in range(asked.seeds):
            data = {task: [lab.labels(task)] for task in TASKS}
            forget, recover = {**FORGET, **fewer}, {**RECOVER, **fewer}
            tuned = lab.train("instruct_distill", INSTRUCT, data["mini_qa"], seed, merge=True, **forget) / MERGED
            teacher = {"teacher": str(INSTRUCT), "context": "prompt", "divergence": "forward_kl"}
            recover["on_policy_kl"] = teacher
            won = lab.train("on_policy_kl", tuned, data["mini_math"], seed, merge=True, **recover) / MERGED
            row = {
                name: {task: lab.score(checkpoint, task, QUESTIONS) for task in TASKS}
                for name, checkpoint in (("tuned", tuned), ("won", won))
            }
            rows.append(row)
            print(f"seed {seed}  before {before}  tuned {row['tuned']}  won back {row['won']}", flush=True)
    missing = [100 * (before["mini_math"] - row["won"]["mini_math"]) for row in rows]
    kept = [(row["won"]["mini_qa"] - before["mini_qa"]) / (row["tuned"]["mini_qa"] - before["mini_qa"]) for row in rows]
    figures = {"before": before, "seeds": rows, "questions": QUESTIONS, "missing": missing, "kept": kept}
    figures["mini_math_points_missing"], figures["mini_qa_gain_kept"] = map(mean_and_interval, (missing, kept))
    recorder.keep(asked, "forgetting", figures)


if __name__ == "__main__":
    main()
