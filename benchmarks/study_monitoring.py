"""False alarms and missed shifts of ``monitor``: samples from the prompt's own domain and from three others.

A short prompt is tuned on movie reviews with SmolLM2-135M. Its reference profile is the one that the run records from
its held-out rows. Each fresh row is observed once, then samples are drawn without replacement: fresh rows are neither
trained on nor held out, and no text appears twice.

    python benchmarks/study_monitoring.py --output benchmarks/results/monitoring_cpu.csv

``--cache`` keeps the tuned prompt and the observations, so that a second run only draws samples.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import argument_parser, write_rows

from softprompt_fast.demo import DOMAINS, INSTRUCTION, LABEL_WORDS, TEMPLATE, balanced, sentiment_rows
from softprompt_fast.evaluation.observations import Observation, observe
from softprompt_fast.evaluation.profile import PROFILE_FILE, Profile
from softprompt_fast.hf.loading import SMOLLM2, load_base_model
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.monitoring import Monitor
from softprompt_fast.tasks.task import Task
from softprompt_fast.tuning.run import tune

OWN = "movies"
ROWS = 200


def observations(arguments: Any) -> tuple[Profile, dict[str, list[Observation]]]:
    """The profile, and the observations of fresh rows of each domain; both from the cache if they are there."""
    folder = arguments.cache / OWN
    files = {domain: arguments.cache / f"{domain}.jsonl" for domain in DOMAINS}
    fresh = {}
    for domain in DOMAINS:
        rows = sentiment_rows(domain)
        if domain == OWN:
            rows, held_out = balanced(rows, arguments.held_out, 0)
            train, rows = rows[: arguments.steps * arguments.batch_size], rows[arguments.steps * arguments.batch_size :]
        fresh[domain] = balanced(rows, arguments.own_rows if domain == OWN else arguments.other_rows, 1)[1]
    if not all(file.is_file() for file in (folder / PROFILE_FILE, *files.values())):
        model, tokenizer = load_base_model(SMOLLM2, device="cpu")
        tuned = SoftPromptModel(model)
        task = Task("classification", TEMPLATE, "label", LABEL_WORDS, max_length=128, model=SMOLLM2, prompt=OWN)
        if not (folder / PROFILE_FILE).is_file():
            options: dict[str, Any] = {"num_virtual_tokens": 20, "init": "text", "init_text": INSTRUCTION}
            options |= {"steps": arguments.steps, "eval_every": arguments.steps, "batch_size": arguments.batch_size}
            tune(tuned, tokenizer, task, train, held_out, arguments.cache, **options)
        else:
            tuned.load_prompt(folder, OWN)
        known = Profile.load(folder).known_tokens
        for domain, file in files.items():
            if not file.is_file():
                start = time.perf_counter()
                seen = observe(tuned, tokenizer, task, fresh[domain], known=known)
                file.write_text("".join(json.dumps(one.to_json()) + "\n" for one in seen))
                print(f"{domain}: {len(seen)} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    seen = {
        domain: [Observation.from_json(json.loads(line)) for line in file.read_text().splitlines()]
        for domain, file in files.items()
    }
    return Profile.load(folder), seen


def arguments_of_the_command_line() -> Any:
    parser = argument_parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path("monitoring-study"), help="folder for prompt and rows")
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=600, help="rows of the reference profile")
    parser.add_argument("--own-rows", type=int, default=1200, help="fresh rows of the prompt's own domain")
    parser.add_argument("--other-rows", type=int, default=240, help="rows of each other domain")
    return parser.parse_args()


def outcome(profile: Profile, rows: list[Observation], samples: int, seed: int) -> dict[str, Any]:
    """How many samples raise an alarm, and each test's part in it."""
    draw = random.Random(seed)
    alarms, by_test = 0, Counter[str]()
    for _ in range(samples):
        report = Monitor(profile).update(draw.sample(rows, ROWS)).report()
        found = [test.name for test in report.tests if test.alarm]
        alarms += bool(found)
        by_test.update(found)
        names = [test.name for test in report.tests]
    return {"alarms": alarms} | {f"alarms: {name}": by_test[name] for name in names}


def main() -> None:
    arguments = arguments_of_the_command_line()
    profile, fresh = observations(arguments)
    rows = []
    for domain, seen in fresh.items():
        for labelled in (True, False):
            used = seen if labelled else [replace(one, correct=None) for one in seen]
            samples = 200 if domain == OWN else 100
            row = {
                "domain": domain,
                "labels": "yes" if labelled else "no",
                "fresh_rows": len(seen),
                "reference_rows": len(profile.observations),
                "rows_per_sample": ROWS,
                "samples": samples,
            }
            rows.append(row | outcome(profile, used, samples, seed=1))
            print(rows[-1])
    # The alarms above depend on one reference. Here each sample has its own: half of the fresh rows and a sample of
    # the other half, so the share of alarms is the level itself. The tokens that are known stay those of the profile.
    draw, alarms, samples = random.Random(2), 0, 200
    for _ in range(samples):
        own = draw.sample(fresh[OWN], len(fresh[OWN]))
        half = len(own) // 2
        redrawn = replace(profile, observations=tuple(own[:half]))
        alarms += Monitor(redrawn).update(own[half : half + ROWS]).report().status == "drift"
    facts = {"domain": f"{OWN}, a new reference each time", "labels": "yes", "fresh_rows": len(fresh[OWN])}
    facts |= {"reference_rows": half, "rows_per_sample": ROWS, "samples": samples, "alarms": alarms}
    rows.append({key: facts.get(key, "") for key in rows[0]})
    print(facts)
    if arguments.output is not None:
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
