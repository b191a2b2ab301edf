"""`brn-serve`: the service and the dashboard in one process; with `--report`, a file instead."""

from __future__ import annotations

import sys

from dashboard import report
from dashboard.app import create_app
from service.__main__ import serve


def main() -> int:
    if any(argument.partition("=")[0] == "--report" for argument in sys.argv[1:]):
        return report.main(sys.argv[1:], prog="brn-serve")
    return serve(create_app, prog="brn-serve", epilog=f"With --report instead: {report.USAGE}")


if __name__ == "__main__":
    sys.exit(main())
