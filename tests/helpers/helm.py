"""Runs Helm's own code on one JSON request from stdin: {"chart": path} lints it, with "values" it renders it.

Prints JSON, or exits with 1 and Helm's message on stderr. It is a program because Helm's library brings Go's runtime,
whose signal handlers sometimes ended the tests' process with SIGSEGV.
"""

import json
import sys

import helm_python


def main() -> int:
    request = json.load(sys.stdin)
    if "values" not in request:
        print(json.dumps(helm_python.lint(request["chart"])))
        return 0
    try:
        with helm_python.Chart.load(request["chart"]) as chart:
            chart.validate_schema(request["values"])
            print(json.dumps(chart.render(request["values"], name="pictures", namespace="prod")))
    except helm_python.HelmError as error:
        print(f"helm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
