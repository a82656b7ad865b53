"""Helm's own code, asked for one thing on stdin: {"chart": path} to lint it, with "values" to render it.

A program and not a module: Helm's library brings Go's runtime with its signal handlers. Loaded into the tests' process
it ended that process with SIGSEGV in Go's code, now and then, and without a word.
Answers in JSON on stdout; 1 with Helm's message on stderr where Helm refuses.
"""

import json
import sys

import helm_python


def main() -> int:
    asked = json.load(sys.stdin)
    if "values" not in asked:
        print(json.dumps(helm_python.lint(asked["chart"])))
        return 0
    try:
        with helm_python.Chart.load(asked["chart"]) as chart:
            chart.validate_schema(asked["values"])
            print(json.dumps(chart.render(asked["values"], name="pictures", namespace="prod")))
    except helm_python.HelmError as error:
        print(f"helm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
