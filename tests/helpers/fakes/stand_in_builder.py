"""A fake of build_engine.py with its output, exit codes and folders, but without torch and without the wait.

    python stand_in_builder.py PLAN [arguments of build_engine.py]

PLAN is a JSON file with `manifest` (to write) and `log` (a file that receives a line with the process id). Optional are
`gate` (a file to wait for half-way), `fail` (its error message, with `code`) and `manifests` (name of a folder ->
another manifest).
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    with Path(plan["log"]).open("a") as log:
        log.write(f"{os.getpid()} {' '.join(sys.argv[2:])}\n")
    staging = out.with_name(f".{out.name}.building-1")
    staging.mkdir()
    for done, step in enumerate(("reference", "export", "compilation of the decoder", "parity")):
        print(f"[{done}/4] {step}", file=sys.stderr, flush=True)
        if done == 2 and "gate" in plan:
            while not Path(plan["gate"]).exists():
                time.sleep(0.01)
    if "fail" in plan:
        print(f"build_engine.py: {plan['fail']}", file=sys.stderr)
        return int(plan["code"])
    (staging / "manifest.json").write_text(json.dumps(plan.get("manifests", {}).get(out.name, plan["manifest"])))
    staging.rename(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
